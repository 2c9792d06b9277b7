"""Episodes by a config."""

from __future__ import annotations

from asyncrl.config import Config
from asyncrl.reward.text import ResponseText
from asyncrl.rollout.episodes.pool import EpisodePool


def make_episodes(config: Config, text_of: ResponseText, longest_prompt_tokens: int) -> EpisodePool | None:
    """Those that `rollout.episode` names, with the gateway before them where there is to be one."""
    rollout, gateway = config.rollout, None
    if rollout.episode is None:
        return None
    if rollout.gateway:
        from asyncrl.rollout.gateway.make import make_gateway  # its package is an extra

        gateway = make_gateway(config, text_of, longest_prompt_tokens)
    return EpisodePool(
        *(rollout.episode, text_of),
        processes=rollout.episode_processes,
        timeout_s=rollout.episode_timeout_s,
        keeps_contexts=rollout.kv_on_update == "keep",
        gateway=gateway,
    )
