"""`inline` mode: the components of an `async` run in one process, on a schedule that depends on nothing but
the seeds.

The trainer's `take` drives the rollout: it leases, steps the engine and delivers until a batch is there.
Every wait is a barrier (scores are waited for between two engine steps), so no outcome depends on how fast
anything is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

from asyncrl.affinity import torch_threads
from asyncrl.config import Config
from asyncrl.core.coordinator import Submission
from asyncrl.core.records import Batch, Group
from asyncrl.errors import RunFailed
from asyncrl.liveness.drops import Drops
from asyncrl.loop.host import Host
from asyncrl.loop.trainer import TrainLoop
from asyncrl.reward.model import LocalRewardModel, load_scorer
from asyncrl.reward.rewards import Rewards
from asyncrl.rollout.engines.base import SteppedEngine, UpdateReport
from asyncrl.rollout.engines.spec import make_engine
from asyncrl.rollout.group import AttemptFailed, GroupRollout
from asyncrl.rollout.make import make_rollout
from asyncrl.rollout.task import RolloutTask
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.state import open_state
from asyncrl.trainer.backend import make_trainer
from asyncrl.weights.source import LocalWeights
from asyncrl.wire.codec import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor

    from asyncrl.weights.canary import Canary

WORKER = "inline"
SCORING_POLL_S = 0.0005


class InlineLink:
    """The trainer's link to a coordinator and an engine in its own process."""

    def __init__(
        self,
        config: Config,
        host: Host,
        engine: SteppedEngine,
        rewards: Rewards,
        rollout: GroupRollout,
    ) -> None:
        self._config = config
        self._host = host
        self._engine = engine
        self._rewards = rewards
        self._rollout = rollout
        self._running: dict[asyncio.Task[Group], RolloutTask] = {}
        self._drops = Drops()

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
            self._lease()
            scored_s = await self._decode()
            began_s, moved_s = began_s + scored_s, moved_s + scored_s  # these waits have their own deadlines
        groups = tuple(unpack(wire.header, wire.frames) for _, wire in taken.groups)
        return Batch(taken.step, taken.version, taken.oldest_version, groups)

    async def come_to_rest(self) -> None:
        """Finish what is being sampled: a checkpoint holds no half responses, and whether a run was
        interrupted at one must make no difference."""
        while self._running:
            await self._decode()

    async def checkpointed(self, oldest: int) -> None:
        self._host.checkpointed(oldest)

    async def publish(
        self, version: int, weights: Mapping[str, Tensor] | None, canary: Canary | None
    ) -> dict[str, float]:
        started_s = time.monotonic()
        assert weights is not None, "the ledger is that of the checkpoint: nothing comes again"
        copies = LocalWeights(version, weights).tensors()
        pause_s = self._engine.swap(copies, version)
        self._host.publish(version)
        self._host.meter.report(WORKER, self._engine.stats())
        self._host.meter.updated(WORKER, UpdateReport(version, 0.0, pause_s))
        self._host.meter.rewards(self._rewards.drain_metrics())
        return self._host.metrics() | {"weights/publish_s": time.monotonic() - started_s}

    async def close(self) -> None:
        """Give up the groups that are being sampled; a run that ends well has none."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _decode(self) -> float:
        """One token of everything that is being sampled. Returns the seconds that scores took."""
        scored_s = await self._settle()
        self._engine.step()
        await asyncio.sleep(0)  # whoever shows the run, or interrupts it, gets a turn
        scored_s += await self._settle()
        self._deliver()
        return scored_s

    def _lease(self) -> None:
        room = self._rollout.room
        if room < 1:
            return
        for leased in self._host.lease(WORKER, self._engine.stats().version, room):
            self._running[asyncio.create_task(self._rollout(leased))] = leased

    async def _settle(self) -> float:
        """Until every group is finished or waits for the engine, and every response that waits is in the
        engine. Returns the seconds that this took."""
        began_s = time.monotonic()
        while True:
            open_groups = [g.lease_id for task, g in self._running.items() if not task.done()]
            progress = [self._rollout.progress(lease_id) for lease_id in open_groups]
            stats = self._engine.stats()
            sampled = sum(p.generating for p in progress) == stats.running + stats.waiting
            if sampled and all(p.generating and not p.elsewhere for p in progress):
                return time.monotonic() - began_s
            waited_s, limit_s = time.monotonic() - began_s, self._config.run.longest_step_s
            if any(p.elsewhere for p in progress) and waited_s > limit_s:
                raise RunFailed(
                    f"an episode has kept the run waiting for {waited_s:.0f} s, for something that is no "
                    "request to the model; give what it awaits a time limit"
                )
            # Scores come from other processes: no need to turn in circles while nothing but them is missing.
            await asyncio.sleep(SCORING_POLL_S if sampled else 0)

    def _deliver(self) -> None:
        """Hand in the finished groups, in the order of their admission."""
        done = sorted((t for t in self._running if t.done()), key=lambda t: self._running[t].group_id)
        for task in done:
            lease = self._running.pop(task)
            try:
                group = task.result()
            except AttemptFailed as failure:
                self._host.fail(
                    lease.group_id, lease.lease_id, failure.reason, failure.detail, failure.sampled_tokens
                )
            else:
                wire = pack(group, lease.lease_id)
                summary = group.summary()
                became = self._host.submit(lease.group_id, lease.lease_id, summary, wire)
                if became is Submission.DROPPED:
                    self._drops.add(summary, time.monotonic())
                else:
                    self._drops = Drops()


async def run_inline(config: Config, run_dir: RunDir) -> None:
    """A whole run in this process, computing with `trainer.threads`. Raises what the components raise."""
    with torch_threads(config.trainer.threads), open_state(config, run_dir) as (prompts, store, coordinator):
        engine = cast(SteppedEngine, make_engine(config, prompts.longest_tokens))
        trainer = make_trainer(config)
        models = {
            model.label: LocalRewardModel(model.label, load_scorer(model)) for model in config.reward.models
        }
        rewards = Rewards(
            config.reward, models, max_steps=config.run.steps, max_tokens=config.rollout.max_new_tokens
        )
        await rewards.start()
        try:
            with ThreadPoolExecutor(1) as executor:
                rollout = make_rollout(config, engine, rewards, prompts.longest_tokens)
                host = Host(config, prompts, coordinator, store)
                link = InlineLink(config, host, engine, rewards, rollout)
                try:
                    await TrainLoop(config, trainer, link, run_dir, executor=executor, overlap=False).run()
                finally:
                    await link.close()
        finally:
            await rewards.close()
            await engine.close()
