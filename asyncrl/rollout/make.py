"""What rolls out by a config: engine, rewards and what drives both."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from asyncrl.config import Config
from asyncrl.curriculum.choices import make_choice
from asyncrl.reward.likelihood import reference_notes
from asyncrl.reward.rewards import RewardModel, Rewards
from asyncrl.reward.text import response_text
from asyncrl.rollout.engines.spec import make_engine
from asyncrl.rollout.group import GroupRollout
from asyncrl.work import unhurried

if TYPE_CHECKING:
    from asyncrl.rollout.episodes.pool import Lend


async def start_rollout(
    config: Config,
    longest_prompt_tokens: int,
    models: Mapping[str, RewardModel] | None = None,
    *,
    shares_gpu: bool = False,
    lend: Lend | None = None,
) -> GroupRollout:
    """A rollout with its engine and its rewards, started; `aclose` ends them.

    models: the reward models by name; None loads them into this process. shares_gpu, lend: as of
    `make_engine` and `EpisodePool`. Raises `ConfigError` for a reward function or an episode that cannot be
    imported.
    """
    async with AsyncExitStack() as failing:
        engine = make_engine(config, longest_prompt_tokens, shares_gpu=shares_gpu)
        failing.push_async_callback(engine.close)
        rewards = Rewards(
            config.reward,
            _in_this_process(config) if models is None else models,
            max_steps=config.run.steps,
            max_tokens=config.rollout.max_new_tokens,
            may_grow=not config.run.in_one_process,  # whose outcome depends on nothing's pace
            workers=config.rollout.workers,
            required=not config.learns_without_rewards,
        )
        text_of, episodes, of_episodes = response_text(config), None, dict[str, Any]()
        if config.rollout.episode is not None:
            from asyncrl.rollout.episodes.make import make_episodes

            episodes, of_episodes = make_episodes(config, text_of, longest_prompt_tokens, lend)
        rollout = GroupRollout(
            engine,
            rewards,
            text_of,
            answer_of=text_of.answer,
            seed=config.run.seed,
            group_size=config.rollout.sampled,
            choice=make_choice(config.rollout),
            context_tokens=config.rollout.context_tokens(longest_prompt_tokens),
            note=reference_notes(config),
            **of_episodes,
        )
        failing.push_async_callback(rewards.close)
        with unhurried("starting the reward functions"):
            await rewards.start()
        if episodes is not None:
            failing.push_async_callback(episodes.close)
            with unhurried("starting the episodes' processes"):
                await episodes.start()
        failing.pop_all()
    return rollout


def _in_this_process(config: Config) -> dict[str, RewardModel]:
    from asyncrl.reward.model import LocalRewardModel, load_scorer  # a run of several processes has no need

    return {m.label: LocalRewardModel(m.label, load_scorer(m)) for m in config.reward.models}
