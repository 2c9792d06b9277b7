"""`inline` mode: the components of an `async` run in one process, on a schedule that depends on nothing but
the seeds.

Worker and trainer run as they always do (`loop/algorithm.py`), over a link that makes a schedule: the
trainer's `take` lets the worker lease, steps the engine and delivers until a batch is there.
Every wait is a barrier (scores are waited for between two engine steps), so no outcome depends on how fast
anything is.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from typing import TYPE_CHECKING, cast

from asyncrl.affinity import torch_threads
from asyncrl.config import Config
from asyncrl.core.coordinator import Taken
from asyncrl.core.records import Batch, Group, Submission
from asyncrl.errors import RunFailed
from asyncrl.liveness.drops import Drops
from asyncrl.loop.algorithm import WorkerLink, roll_out, train
from asyncrl.loop.host import Host, Leases
from asyncrl.loop.trainer import TrainerLink, TrainingRun
from asyncrl.rollout.engines.base import SteppedEngine, UpdateReport
from asyncrl.rollout.group import AttemptFailed, GroupRollout
from asyncrl.rollout.make import start_rollout
from asyncrl.rollout.task import RolloutTask
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import open_state
from asyncrl.states import doing
from asyncrl.trainer.backend import make_trainer
from asyncrl.weights.adapters import merging
from asyncrl.weights.source import LocalWeights
from asyncrl.wire.codec import decode_group, encode_group

if TYPE_CHECKING:
    from torch import Tensor

    from asyncrl.trainer.backend import Trainer
    from asyncrl.weights.canary import Canary

WORKER = "inline"
SCORING_POLL_S = 0.0005
OWN_TURNS = 20
"""What this process has to do itself is done after so many turns of the loop."""
Beside = Callable[["TrainerLink", "Trainer"], AbstractAsyncContextManager["TrainerLink"]]
"""What goes on beside the training: it is given the trainer's link, and gives another one."""


class Schedule(WorkerLink):
    """The worker's link to a host in its own process. What the worker asks for and hands in, and what its
    episodes ask of the engine, waits for its turn."""

    def __init__(self, config: Config, leases: Leases, rollout: GroupRollout) -> None:
        self._config = config
        self._leases = leases
        self._rollout = rollout
        self._engine = cast(SteppedEngine, rollout.engine)
        self._asking: asyncio.Future[list[RolloutTask] | None] | None = None
        """The worker's, when it has asked for groups."""
        self._leased: set[int] = set()
        """Leases of groups that are being sampled."""
        self._finished: list[tuple[RolloutTask, Group | AttemptFailed]] = []
        self._drops = Drops()
        self._at_door: dict[tuple[int, int, int], asyncio.Future[None]] = {}
        """Requests that will enter the engine together, in their order and not in that of their arrival."""
        rollout.enter = self._wait_at_door

    # ---- the worker's --------------------------------------------------------------------------------------

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """The worker runs beside the body. What is being sampled at its end is given up; a run that ends well
        has nothing left."""
        self._worker = asyncio.create_task(roll_out(self._rollout, self))
        try:
            yield
        finally:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    async def lease(self, limit: int) -> list[RolloutTask] | None:
        self._asking = asyncio.get_running_loop().create_future()
        return await self._asking

    async def submit(self, task: RolloutTask, group: Group | AttemptFailed) -> None:
        self._leased.remove(task.lease_id)
        self._finished.append((task, group))

    fail = submit

    async def roll_out(self) -> None:
        """All that will be leased."""
        while not self._leases.finished:
            await self._lease()
            await self._decode()

    async def come_to_rest(self) -> None:
        """Finish what is being sampled: a checkpoint holds no half responses, and whether a run was
        interrupted at one must make no difference."""
        while self._leased:
            await self._decode()
        self._engine.forget()

    # ---- the schedule --------------------------------------------------------------------------------------

    async def _decode(self) -> float:
        """One token of everything that is being sampled. Returns the seconds that scores took."""
        scored_s = await self._settle()
        self._engine.step()
        await asyncio.sleep(0)  # whoever shows the run, or interrupts it, gets a turn
        scored_s += await self._settle()
        self._deliver()
        return scored_s

    async def _lease(self) -> None:
        """Let the worker have what there is room for."""
        if self._rollout.room < 1:
            return
        while self._asking is None:
            await self._turn()
        if leased := self._leases.lease(WORKER, self._engine.stats().version, self._rollout.room):
            self._leased |= {task.lease_id for task in leased}
            self._asking.set_result(leased)
            self._asking = None

    async def _settle(self) -> float:
        """Until every group is finished or waits for the engine, and every response that waits is in the
        engine. Returns the seconds that this took."""
        began_s = time.monotonic()
        for turn in itertools.count():
            progress = [self._rollout.progress(lease_id) for lease_id in self._leased]
            stats = self._engine.stats()
            in_engine = stats.running + stats.waiting
            sampled = sum(p.generating for p in progress) == in_engine + len(self._at_door)
            if sampled and all((p.generating or p.standing_back) and not p.elsewhere for p in progress):
                if not self._at_door:
                    return time.monotonic() - began_s
                self._open_door()
            waited_s, limit_s = time.monotonic() - began_s, self._config.run.longest_step_s
            if waited_s > limit_s and (not sampled or any(p.elsewhere for p in progress)):
                raise RunFailed(
                    f"an episode has kept the run waiting for {waited_s:.0f} s, for something that is no "
                    "request to the model; give what it awaits a time limit"
                )
            # Scores and episodes come from other processes: no need to turn in circles while nothing but them
            # is missing.
            with doing("score"):
                await self._turn(SCORING_POLL_S if sampled or turn > OWN_TURNS else 0)
        raise AssertionError("endless")

    async def _wait_at_door(self, key: tuple[int, int, int]) -> None:
        door = self._at_door[key] = asyncio.get_running_loop().create_future()
        try:
            await door
        finally:
            self._at_door.pop(key, None)

    def _open_door(self) -> None:
        for _, door in sorted(self._at_door.items()):
            if not door.done():
                door.set_result(None)
        self._at_door.clear()

    async def _turn(self, seconds: float = 0) -> None:
        """The worker's. Raises what has ended it."""
        await asyncio.sleep(seconds)
        if self._worker.done():
            error = self._worker.exception()
            assert isinstance(error, BaseExceptionGroup), f"the worker has ended: {error!r}"
            raise error.exceptions[0]

    def _deliver(self) -> None:
        """Hand in the finished groups, in the order of their admission."""
        self._finished.sort(key=lambda finished: finished[0].group_id)
        for task, outcome in self._finished:
            if isinstance(outcome, AttemptFailed):
                told = (outcome.reason, outcome.detail, outcome.sampled_tokens)
                self._leases.fail(task.group_id, task.lease_id, *told)
                continue
            summary, payload = outcome.summary(), encode_group(outcome, task.lease_id)
            became = self._leases.submit(task.group_id, task.lease_id, task.row, summary, payload)
            if became is Submission.DROPPED:
                self._drops.add(summary, time.monotonic())
            else:
                self._drops = Drops()
        self._finished.clear()


class InlineLink(Schedule, TrainerLink):
    """The links of worker and trainer to a coordinator in their own process."""

    decodes_to_rest = True

    def __init__(self, config: Config, host: Host, rollout: GroupRollout) -> None:
        super().__init__(config, host, rollout)
        self._host = host
        self._merge = merging(config)
        self.take_weights = self._swap
        """What becomes of a version's weights, by `state_dict` name."""

    async def begin(self, version: int) -> int:
        return self._host.begin(version)

    async def take(self, step: int) -> Batch:
        """Roll out until the step has its batch."""
        run, tokens = self._config.run, -1
        began_s = moved_s = time.monotonic()
        self._drops = Drops()
        while (taken := self._host.take(step)) is None:
            now_s = time.monotonic()
            if self._drops.lasted_s(now_s) > run.stall_s:
                waited = f"step {step} has waited for its batch for {now_s - began_s:.0f} s"
                raise RunFailed(f"{self._drops.cause()} So {waited} (run.stall_s={run.stall_s:g})")
            if (generated := self._engine.stats().generated_tokens) != tokens:
                tokens, moved_s = generated, now_s
            if now_s - moved_s > run.stall_s or now_s - began_s > run.longest_step_s:
                raise RunFailed(
                    f"step {step} has waited for its batch for {now_s - began_s:.0f} s, and no token was "
                    f"generated for {now_s - moved_s:.0f} s (run.stall_s={run.stall_s:g}); the ledger: "
                    f"{self._host.coordinator.ledger.metrics()}"
                )
            await self._lease()
            scored_s = await self._decode()
            began_s, moved_s = began_s + scored_s, moved_s + scored_s  # these waits have their own deadlines
        return self._batch(taken)

    async def ready(self, step: int) -> Batch | None:
        taken = self._host.take(step)
        return None if taken is None else self._batch(taken)

    def _batch(self, taken: Taken[bytes]) -> Batch:
        groups = tuple(decode_group(wire) for _, wire in taken.groups)
        return Batch(taken.step, taken.version, taken.oldest_version, groups)

    async def checkpointed(self, oldest: int) -> None:
        self._host.checkpointed(oldest)

    async def publish(
        self, version: int, weights: Mapping[str, Tensor] | None, canary: Canary | None
    ) -> dict[str, float]:
        started_s = time.monotonic()
        assert weights is not None, "the ledger is that of the checkpoint: nothing comes again"
        whole = self._merge(LocalWeights(version, weights)).tensors()
        self.take_weights(version, whole)
        self._host.publish(version)
        self._host.meter.report(WORKER, self._engine.stats())
        self._host.meter.rewards(self._rollout.drain_metrics())
        return self._host.metrics() | {"weights/publish_s": time.monotonic() - started_s}

    def _swap(self, version: int, weights: Mapping[str, Tensor]) -> None:
        pause_s = self._engine.swap(weights, version)
        self._host.meter.updated(WORKER, UpdateReport(version, 0.0, pause_s))


async def run_inline(config: Config, run_dir: RunDir, beside: Beside) -> None:
    """A whole run in this process, computing with `trainer.threads`. Raises what the components raise."""
    with torch_threads(config.trainer.threads), open_state(config, run_dir) as (prompts, store, coordinator):
        async with aclosing(await start_rollout(config, prompts.longest_tokens)) as rollout:
            link = InlineLink(config, Host(config, prompts.rows, coordinator, store), rollout)
            turns = None
            if config.placement.in_turns:
                from asyncrl.loop.colocation import TakesTurns, TurnsInside

                turns = TurnsInside(link, rollout.engine)
            trainer = make_trainer(config)
            with ThreadPoolExecutor(1) as executor:
                by_turns = link if turns is None else TakesTurns(link, turns, trainer, executor)
                async with link.working(), beside(by_turns, trainer) as seen:
                    await train(TrainingRun(config, trainer, seen, run_dir, executor=executor, overlap=False))
