"""Episodes by a config."""

from __future__ import annotations

from functools import partial
from typing import Any

from asyncrl.config import Config
from asyncrl.reward.text import ResponseText
from asyncrl.rollout.chat import make_chat
from asyncrl.rollout.episodes.conversation import Conversation
from asyncrl.rollout.episodes.pool import EpisodePool, Lend


def make_episodes(
    config: Config, text_of: ResponseText, longest_prompt_tokens: int, lend: Lend | None = None
) -> tuple[EpisodePool, dict[str, Any]]:
    """Those that `rollout.episode` names, with the gateway before them where there is to be one; and what a
    `GroupRollout` is given of them. lend: as of `EpisodePool`."""
    rollout, gateway = config.rollout, None
    assert rollout.episode is not None
    if rollout.gateway:
        from asyncrl.rollout.gateway.make import make_gateway  # its package is an extra

        gateway = make_gateway(config, text_of, longest_prompt_tokens)
    episodes = EpisodePool(
        *(rollout.episode, text_of),
        processes=rollout.episode_processes,
        timeout_s=rollout.episode_timeout_s,
        keeps_contexts=rollout.kv_on_update == "keep",
        gateway=gateway,
        lend=lend,
    )
    chat = make_chat(config, rollout.context_tokens(longest_prompt_tokens))
    return episodes, {
        "episode": episodes,
        "session": partial(Conversation, chat=chat, max_turns=rollout.episode_turns),
        "end_episodes": episodes.close,
        "episode_metrics": episodes.drain_metrics,
    }
