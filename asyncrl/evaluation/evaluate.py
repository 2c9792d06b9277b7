"""Scores a model on prompts that it was not trained on, with the sampling and the rewards of a run's
config."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from asyncrl.config import Config, from_tree
from asyncrl.config.model_paths import with_model_paths
from asyncrl.core.coordinator import Coordinator
from asyncrl.core.cursor import PromptCursor
from asyncrl.core.records import FinishReason, Group
from asyncrl.data.load import load_prompts
from asyncrl.data.prompts import Prompt
from asyncrl.data.rows import told
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.errors import AsyncRLError, ConfigError, RunFailed
from asyncrl.evaluation.books import EvaluationBooks
from asyncrl.event_loop import run_to_end
from asyncrl.loop.algorithm import roll_out
from asyncrl.loop.host import Host, LeasesFor
from asyncrl.observe.samples import Sample, choose
from asyncrl.rollout.engines.base import EngineError
from asyncrl.rollout.engines.spec import EngineSpec, engine_of
from asyncrl.rollout.group import AttemptFailed
from asyncrl.rollout.make import start_rollout
from asyncrl.rollout.task import RolloutTask, sampling_of
from asyncrl.runfiles.earlier_run import model_in
from asyncrl.runfiles.state import loop_settings
from asyncrl.section import with_values
from asyncrl.specs import those
from asyncrl.trainer.models.packed import load_decoder
from asyncrl.weights.source import LocalWeights
from asyncrl.wire.codec import WireGroup, decode_group, encode_group

WORKER = "evaluation"
VERSION = 0
"""Of the weights that are evaluated."""


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


def evaluate_model(config: Config, model: str | None = None, *, limit: int | None = None) -> Evaluation:
    """What `asyncrl eval` does for one model: score it on the held-out prompts of a config.

    model: folder or hub name of a model, or the folder of a run (its newest checkpoint); None means
    `model.path`. limit: use only the first `limit` prompts. Raises `ConfigError` and `RunFailed`. May be
    called while an event loop is running (in a notebook).
    """
    path = model_in("model", model or config.model.path)
    checked = from_tree(config.model_dump(mode="json"))  # one that was made in Python never was
    config = with_model_paths(checked, {"model.path": path})
    return run_to_end(evaluate(config, held_out(config)[:limit]))


async def evaluate(config: Config, prompts: Sequence[Prompt]) -> Evaluation:
    """Sample `rollout.group_size` responses to each prompt from `model.path`, by the engine that the config
    names, and score them.

    Raises `ConfigError` for a config that asks for nothing, `RunFailed` when a prompt cannot be sampled or
    scored.
    """
    if not prompts:
        raise ConfigError(f"{told(config.data)}: there is no prompt to evaluate on")
    if not engine_of(config).samples:
        raise ConfigError(
            f"rollout.engine={config.rollout.engine} samples nothing that could be scored; use "
            f"{those(EngineSpec, lambda spec: spec.samples)}"
        )
    for i, judge in enumerate(config.reward.judges):
        if judge.is_initial:
            raise ConfigError(
                f"reward.judges.{i}.model={judge.model} is served by a process of a run, and here "
                f"is none; serve the model, and name its server: reward.judges.{i}.url"
            )
    try:
        return _summary(config, await _sampled(config, prompts))
    except ExceptionGroup as failures:
        raise _for_people(failures) from failures


async def _sampled(config: Config, prompts: Sequence[Prompt]) -> list[Group]:
    """A group for each prompt, by a run without a training step. Raises an `ExceptionGroup` of what went
    wrong."""
    changed = asyncio.Event()
    settings = replace(loop_settings(config), total_steps=0)
    coordinator: Coordinator[WireGroup] = Coordinator(settings, PromptCursor(1, 0))
    books: EvaluationBooks[WireGroup] = EvaluationBooks(
        len(prompts), 1, config.rollout.max_attempts, coordinator.next_lease_id
    )
    rollout = config.rollout
    evaluation = LeasesFor(books, prompts, rollout.group_size, sampling_of(rollout))
    # On the CPU: the engine has a copy of its own, wherever it computes.
    on_cpu = with_values(config, {"trainer.device": "cpu"})
    config = with_values(config, {"rollout.candidates": None})
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    host = Host(config, (), coordinator, None, evaluation=evaluation, happened=changed.set)
    async with aclosing(await start_rollout(config, longest, shares_gpu=True)) as group_rollout:
        weights = load_decoder("model.path", config.model.path, on_cpu).state_dict()
        async with asyncio.TaskGroup() as tasks:
            driving = tasks.create_task(group_rollout.engine.run())
            await group_rollout.engine.update_weights(LocalWeights(VERSION, weights))
            host.publish(VERSION)
            await roll_out(group_rollout, _Link(host, changed))
            driving.cancel()
    (only,) = books.rounds
    wires = [only.groups[row] for row in range(len(prompts))]
    return [decode_group(wire.header, wire.frames) for wire in wires]


class _Link:
    """The worker's, to a host in this process."""

    def __init__(self, host: Host, changed: asyncio.Event) -> None:
        self._host = host
        self._changed = changed

    async def lease(self, limit: int) -> list[RolloutTask] | None:
        while not (leased := self._host.lease(WORKER, VERSION, limit)):
            if self._host.finished:
                return None
            self._changed.clear()
            await self._changed.wait()
        return leased

    async def submit(self, task: RolloutTask, group: Group) -> None:
        self._host.submit(task, group.summary(), encode_group(group, task.lease_id, task.purpose))

    async def fail(self, task: RolloutTask, failure: AttemptFailed) -> None:
        if not self._host.fail(task, failure.reason, failure.detail, failure.sampled_tokens):
            raise failure


def _for_people(failures: ExceptionGroup[Exception]) -> Exception:
    """What has gone wrong first, where that has words; else all of it."""
    first: Exception = failures
    while isinstance(first, ExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, AttemptFailed | EngineError):
        return RunFailed(f"the evaluation cannot go on: {first}")
    return first if isinstance(first, AsyncRLError) else failures


def _samples(config: Config, groups: Sequence[Group]) -> Iterator[Sample]:
    decode = load_tokenizer(config.model).decode
    chosen = {id(trajectory): why for why, _, trajectory in choose(groups)}
    for group in groups:
        for t in group.trajectories:
            yield Sample.of(0, chosen.get(id(t), []), group, t, decode, model=config.model.path)


def _summary(config: Config, groups: Sequence[Group]) -> Evaluation:
    members = [member for group in groups for member in group.members()]
    parts: dict[str, list[float]] = defaultdict(list)
    for first, *_ in members:
        for name, value in first.reward_parts.items():
            parts[name].append(value)
    return Evaluation(
        len(groups),
        tuple(_samples(config, groups)),
        tuple(first.reward for first, *_ in members),
        {name: tuple(values) for name, values in sorted(parts.items())},
        statistics.fmean(sum(t.sampled_tokens for t in member) for member in members),
        statistics.fmean(any(t.finish_reason is FinishReason.LENGTH for t in member) for member in members),
    )
