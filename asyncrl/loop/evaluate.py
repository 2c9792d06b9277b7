"""Scores a model on prompts that it was not trained on, with the sampling and the rewards of a run's
config."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from asyncrl.config import Config
from asyncrl.core.records import FinishReason, Group
from asyncrl.data.load import load_prompts
from asyncrl.data.prompts import Prompt
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.errors import AsyncRLError, ConfigError, RunFailed
from asyncrl.observe.samples import Sample, choose
from asyncrl.reward.model import LocalRewardModel, load_scorer
from asyncrl.reward.rewards import Rewards
from asyncrl.rollout.engines.base import Engine, EngineError
from asyncrl.rollout.engines.spec import engine_of, make_engine, those
from asyncrl.rollout.group import AttemptFailed
from asyncrl.rollout.make import make_rollout
from asyncrl.rollout.task import RolloutTask
from asyncrl.trainer.models.packed import load_decoder
from asyncrl.weights.source import LocalWeights


@dataclass(frozen=True, slots=True)
class Evaluation:
    """rewards: of each response. parts: of each response that has the part, by name."""

    prompts: int
    samples: tuple[Sample, ...]
    """All responses, to be read."""
    rewards: tuple[float, ...]
    parts: dict[str, tuple[float, ...]]
    response_tokens: float
    """Mean."""
    truncated_frac: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rewards)

    @property
    def std(self) -> float:
        """Of single responses' rewards."""
        return statistics.pstdev(self.rewards)

    @property
    def standard_error(self) -> float:
        """Of `mean`, were the responses independent."""
        return self.std / math.sqrt(len(self.rewards))


def held_out(config: Config) -> Sequence[Prompt]:
    """The dataset's last `data.held_out_rows` rows; all of it where none are held out."""
    _, kept_out = load_prompts(config.data, load_tokenizer(config.model)).split(config.data.held_out_rows)
    return kept_out.rows


async def evaluate(config: Config, prompts: Sequence[Prompt]) -> Evaluation:
    """Sample `rollout.group_size` responses to each prompt from `model.path`, by the engine that the config
    names, and score them.

    Raises `ConfigError` for a config that asks for nothing, `RunFailed` when a prompt cannot be sampled or
    scored.
    """
    if not prompts:
        raise ConfigError(f"data.path={config.data.path}: there is no prompt to evaluate on")
    if not engine_of(config).samples:
        raise ConfigError(
            f"rollout.engine={config.rollout.engine} samples nothing that could be scored; use "
            f"{those(lambda spec: spec.samples)}"
        )
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    engine = make_engine(config, longest, shares_gpu=True)
    try:
        return _summary(config, await _sampled(config, prompts, engine, longest))
    except ExceptionGroup as failures:
        raise _for_people(failures) from failures
    finally:
        await engine.close()


async def _sampled(
    config: Config, prompts: Sequence[Prompt], engine: Engine, longest_prompt_tokens: int
) -> list[Group]:
    """A group for each prompt. Raises an `ExceptionGroup` of what went wrong."""
    models = {m.label: LocalRewardModel(m.label, load_scorer(m)) for m in config.reward.models}
    rewards = Rewards(config.reward, models, max_steps=0, max_tokens=config.rollout.max_new_tokens)
    rollout = make_rollout(config, engine, rewards, longest_prompt_tokens)
    # On the CPU: the engine has a copy of its own, wherever it computes.
    on_cpu = config.model_copy(update={"trainer": config.trainer.model_copy(update={"device": "cpu"})})
    weights = load_decoder("model.path", config.model.path, on_cpu).state_dict()
    await rewards.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            driving = tasks.create_task(engine.run())
            await engine.update_weights(LocalWeights(0, weights))
            async with asyncio.TaskGroup() as groups:
                found = [groups.create_task(rollout(_task(i, prompt))) for i, prompt in enumerate(prompts)]
            driving.cancel()
    finally:
        await rewards.close()
    return [group.result() for group in found]


def _for_people(failures: ExceptionGroup[Exception]) -> Exception:
    """What has gone wrong first, where that has words; else all of it."""
    first: Exception = failures
    while isinstance(first, ExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, AttemptFailed | EngineError):
        return RunFailed(f"the evaluation cannot go on: {first}")
    return first if isinstance(first, AsyncRLError) else failures


def _task(index: int, prompt: Prompt) -> RolloutTask:
    return RolloutTask(
        index, index, 0, prompt.index, prompt.prompt, prompt.prompt_ids.tolist(), prompt.columns
    )


def _samples(config: Config, groups: Sequence[Group]) -> Iterator[Sample]:
    decode = load_tokenizer(config.model).decode
    chosen = {id(trajectory): why for why, _, trajectory in choose(groups)}
    for group in groups:
        for t in group.trajectories:
            yield Sample.of(0, chosen.get(id(t), []), group, t, decode, model=config.model.path)


def _summary(config: Config, groups: Sequence[Group]) -> Evaluation:
    trajectories = [t for group in groups for t in group.trajectories]
    parts: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        for name, value in trajectory.reward_parts.items():
            parts[name].append(value)
    return Evaluation(
        len(groups),
        tuple(_samples(config, groups)),
        tuple(t.reward for t in trajectories),
        {name: tuple(values) for name, values in sorted(parts.items())},
        statistics.fmean(t.sampled_tokens for t in trajectories),
        statistics.fmean(t.finish_reason is FinishReason.LENGTH for t in trajectories),
    )
