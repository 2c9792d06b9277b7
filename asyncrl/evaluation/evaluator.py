"""One engine and the rewards of a config, by which one version of the weights after the other is scored on
held-out prompts."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from asyncrl.config import Config
from asyncrl.config.evaluation import EvaluationConfig
from asyncrl.core.records import Group
from asyncrl.data.prompts import PromptSet
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.evaluation import scores
from asyncrl.evaluation.host import EvaluationHost
from asyncrl.evaluation.sets import by_scorer
from asyncrl.evaluation.suites import further, scoring
from asyncrl.loop.algorithm import WorkerLink, roll_out
from asyncrl.loop.inline import Schedule
from asyncrl.observe.samples import Sample, choose
from asyncrl.reward.rewards import RewardModel, Rewards
from asyncrl.reward.text import response_text
from asyncrl.rollout.engines.base import SteppedEngine
from asyncrl.rollout.group import AttemptFailed, GroupRollout
from asyncrl.rollout.make import start_rollout
from asyncrl.rollout.task import RolloutTask
from asyncrl.section import with_values
from asyncrl.weights.adapters import Merging, merging
from asyncrl.weights.source import WeightSource
from asyncrl.wire.codec import decode_group, encode_group
from asyncrl.work import did_one, unhurried, working

if TYPE_CHECKING:
    from asyncrl.rollout.episodes.pool import Lend

WORKER = "evaluation"


class Evaluator:
    """Samples responses to the prompts and scores them.

    passes: what carries out which of the prompts, in their order, all by the same engine. merge: as of
    `merging`, for versions that are adapters.
    """

    def __init__(
        self, config: Config, passes: Sequence[tuple[GroupRollout, PromptSet]], merge: Merging
    ) -> None:
        self._config = config
        self._passes = passes
        self._engine = passes[0][0].engine
        self._merge = merge
        self._names = config.scored_names
        self._sets = [self._names[prompt.dataset] for _, prompts in passes for prompt in prompts]
        self.turn: Callable[[], Awaitable[None]] | None = None
        """Waited for before prompts are taken."""
        self.ended: Callable[[int], None] = lambda prompts: None
        """Called with how many prompts have come to an end, whenever one has."""
        self._decode: Callable[[Sequence[int]], str] = load_tokenizer(config.model).decode

    async def measure(
        self, source: WeightSource, *, hopeless_after: float = math.inf
    ) -> tuple[dict[int, Group], dict[int, str]]:
        """A group of every prompt, by its place, all sampled by this version; and of the prompts that have
        failed in every attempt, why. hopeless_after: as of `EvaluationHost`, for each pass."""
        whole = self._merge(source)
        if self._config.run.in_one_process:
            engine = cast(SteppedEngine, self._engine)
            engine.forget()
            engine.swap(whole.tensors(), whole.version)
        else:
            await self._engine.update_weights(whole)
        groups: dict[int, Group] = {}
        failed: dict[int, str] = {}
        begin = 0
        for rollout, prompts in self._passes:
            host = await self._pass(rollout, prompts, source.version, hopeless_after, begin)
            for row, wire in sorted(host.groups.items()):
                groups[begin + row] = replace(decode_group(wire), group_id=begin + row)
            failed |= {begin + row: why for row, why in host.failed.items()}
            begin += len(prompts)
        return groups, failed

    async def _pass(
        self,
        rollout: GroupRollout,
        prompts: PromptSet,
        version: int,
        hopeless_after: float,
        ended_before: int,
    ) -> EvaluationHost:
        """With what came of each prompt. ended_before: prompts of earlier passes."""
        changed = asyncio.Event()

        def happened() -> None:
            changed.set()
            self.ended(ended_before + len(host.groups) + len(host.failed))

        host = EvaluationHost(version, prompts.rows, self._config.rollout, happened, hopeless_after)
        if self._config.run.in_one_process:
            link = Schedule(self._config, host, rollout)
            async with link.working():
                await link.roll_out()
        else:
            with working(f"prompts of version {version}", len(prompts)):
                await roll_out(rollout, _Link(host, changed, version, self.turn))
        return host

    def busy_s(self) -> float:
        """How long the engine has had requests, in all."""
        return self._engine.stats().busy_s

    def metrics(self, groups: Mapping[int, Group]) -> dict[str, float]:
        """Of what `measure` gave, by their names in `metrics.jsonl`."""
        by_set = self.by_set(groups)
        failed = {name: self._sets.count(name) - len(each) for name, each in by_set.items()}
        success_above = EvaluationConfig.model_fields["success_above"].default
        if self._config.evaluation is not None:
            success_above = self._config.evaluation.success_above
        return scores.metrics(by_set, failed, success_above) | further(self._config, by_set)

    def by_set(self, groups: Mapping[int, Group]) -> dict[str, list[Group]]:
        """Of what `measure` gave."""
        return {
            name: [groups[row] for row, of in enumerate(self._sets) if of == name and row in groups]
            for name in self._names
        }

    def by_prompt(self, groups: Mapping[int, Group]) -> dict[str, tuple[float, ...]]:
        """Of each set, the mean reward of each prompt's responses, in the order of the prompts; NaN of one
        that has failed."""
        found: dict[str, list[float]] = {name: [] for name in self._names}
        for row, name in enumerate(self._sets):
            found[name].append(scores.mean_reward(groups[row]) if row in groups else math.nan)
        return {name: tuple(values) for name, values in found.items()}

    def samples(self, groups: Sequence[Group], step: int, model: str) -> Iterator[Sample]:
        """All responses, to be read."""
        chosen = {id(trajectory): why for why, _, trajectory in choose(groups)} if groups else {}
        for group in groups:
            for t in group.trajectories:
                yield Sample.of(step, chosen.get(id(t), []), group, t, self._decode, model=model)


@asynccontextmanager
async def evaluating(
    config: Config,
    prompts: PromptSet,
    models: Mapping[str, RewardModel] | None = None,
    *,
    shares_gpu: bool = False,
    lend: Lend | None = None,
) -> AsyncIterator[Evaluator]:
    """An evaluator with an engine of its own, while the body runs. models, shares_gpu, lend: as of
    `start_rollout`. What goes wrong in the engine ends the body, and is raised as an `ExceptionGroup`."""
    merge = merging(config)
    own = {} if config.evaluation is None else config.evaluation.rollout(config.rollout)
    alone = {"rollout.candidates": None, "rollout.choose": "first", "trainer.lora": None}
    config = with_values(config, {**alone, **own})
    of_rewards, of_suites = by_scorer(config, prompts)
    first = config if len(of_rewards) else scoring(config)
    async with (
        aclosing(
            await start_rollout(first, prompts.longest_tokens, models, shares_gpu=shares_gpu, lend=lend)
        ) as rollout,
        AsyncExitStack() as stack,
        asyncio.TaskGroup() as tasks,
    ):
        passes = [(rollout, of_rewards if len(of_rewards) else of_suites)]
        if len(of_rewards) and len(of_suites):
            beside = _beside(rollout, scoring(config), prompts.longest_tokens)
            passes.append((await stack.enter_async_context(beside), of_suites))
        # The engine of an `inline` run is stepped by its link.
        driving = None if config.run.in_one_process else tasks.create_task(rollout.engine.run())
        yield Evaluator(config, passes, merge)
        if driving is not None:
            driving.cancel()


@asynccontextmanager
async def _beside(
    rollout: GroupRollout, config: Config, longest_prompt_tokens: int
) -> AsyncIterator[GroupRollout]:
    """Another rollout by the engine of this one, with the rewards of `config`, while the body runs."""
    may_grow, text_of = not config.run.in_one_process, response_text(config)
    rewards = Rewards(
        config.reward,
        {},
        max_steps=config.run.steps,
        max_tokens=config.rollout.max_new_tokens,
        may_grow=may_grow,
    )
    try:
        with unhurried("starting the suites' scorers"):
            await rewards.start()
        yield GroupRollout(
            rollout.engine,
            rewards,
            text_of,
            answer_of=text_of.answer,
            seed=config.run.seed,
            group_size=config.rollout.group_size,
            context_tokens=config.rollout.context_tokens(longest_prompt_tokens),
        )
    finally:
        await rewards.close()


class _Link(WorkerLink):
    """The worker's, to a host in this process."""

    def __init__(
        self,
        host: EvaluationHost,
        changed: asyncio.Event,
        version: int,
        turn: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._host = host
        self._changed = changed
        self._version = version
        self._turn = turn

    async def lease(self, limit: int) -> list[RolloutTask] | None:
        while not self._host.finished:
            if self._host.has_prompts:
                if self._turn is not None:
                    await self._turn()
                return self._host.lease(WORKER, self._version, limit)
            self._changed.clear()
            await self._changed.wait()
        return None

    async def submit(self, task: RolloutTask, group: Group) -> None:
        told = (task.group_id, task.lease_id, task.row)
        self._host.submit(*told, group.summary(), encode_group(group, task.lease_id))
        did_one()

    async def fail(self, task: RolloutTask, failure: AttemptFailed) -> None:
        told = (failure.reason, failure.detail, failure.sampled_tokens)
        self._host.fail(task.group_id, task.lease_id, *told)
