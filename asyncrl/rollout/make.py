"""The rollout that a config describes."""

from __future__ import annotations

from asyncrl.config import Config
from asyncrl.reward.rewards import Rewards
from asyncrl.rollout.engines.base import Engine
from asyncrl.rollout.episode import make_episode
from asyncrl.rollout.group import GroupRollout
from asyncrl.rollout.text import response_text


def make_rollout(
    config: Config, engine: Engine, rewards: Rewards, longest_prompt_tokens: int
) -> GroupRollout:
    """Raises `ConfigError` for an episode that cannot be imported."""
    return GroupRollout(
        engine,
        rewards,
        response_text(config),
        config.rollout,
        seed=config.run.seed,
        episode=make_episode(config.rollout.episode),
        context_tokens=config.rollout.context_tokens(longest_prompt_tokens),
    )
