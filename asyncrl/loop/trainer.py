"""The trainer's loop: take a batch, train on it, publish the weights, write the step's line."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.observe.clock import OTHER, TimeShares
from asyncrl.observe.metrics import MetricsWriter
from asyncrl.observe.samples import SamplesWriter
from asyncrl.observe.symptoms import Symptoms
from asyncrl.reward.statistics import RewardScaler
from asyncrl.rollout.engines.spec import engine_of
from asyncrl.runfiles.budget import Budget, Usage
from asyncrl.runfiles.checkpoint_saver import CheckpointSaver
from asyncrl.runfiles.layout import RunDir
from asyncrl.trainer.backend import backend_of
from asyncrl.waits import waiting
from asyncrl.work import unhurried

if TYPE_CHECKING:
    from asyncrl.trainer.backend import Trainer
    from asyncrl.weights.canary import Canary
    from asyncrl.weights.published import PublishedWeights


log = logging.getLogger(__name__)

PHASES = ("wait", "train", "publish", "checkpoint", OTHER)
"""Of a step's wall clock; they add up to it."""


class TrainerLink(Protocol):
    """The trainer's way to the coordinator and the engines."""

    async def begin(self, version: int) -> int:
        """The trainer has the weights of `version`; what was trained since comes again. Returns the highest
        version that there has been: before it, the engines need no weights."""

    async def take(self, step: int) -> Batch:
        """The batch of a training step, as soon as there is one."""

    async def publish(
        self, version: int, weights: PublishedWeights | None, canary: Canary | None
    ) -> dict[str, float]:
        """The step that made a version is done; `weights` for the engines, None where they need none. Returns
        the metrics that the coordinator and the engines have to give, `weights/publish_s` among them."""

    async def come_to_rest(self) -> None:
        """A checkpoint is about to be made: bring what it cannot hold to an end."""

    async def checkpointed(self, oldest: int) -> None:
        """The trainer will never again begin with a version before `oldest`."""


class TrainLoop:
    """Runs training steps to the end of the run, from the newest checkpoint on.

    executor: where the trainer computes, so that the next batch arrives meanwhile.
    overlap: ask for the next batch before training on this one, and write checkpoints beside the training.
    """

    def __init__(
        self,
        config: Config,
        trainer: Trainer,
        link: TrainerLink,
        run_dir: RunDir,
        *,
        executor: Executor,
        overlap: bool,
    ) -> None:
        self._config = config
        self._trainer = trainer
        self._link = link
        self._run_dir = run_dir
        self._budget = Budget(Usage.load(run_dir.usage), config.run.gpu_hours, config.run.steps)
        self._executor = executor
        self._overlap = overlap
        self._scaler = RewardScaler(config.reward)
        self._saver = CheckpointSaver(run_dir, config.checkpoint, link, by_clock=overlap)
        self._shares = TimeShares()
        self._frontier = 0

    async def run(self) -> None:
        """Returns after the last step, its weights published and everything saved; the budget may make that
        an earlier one than the config says."""
        done = await self._restore()
        self._frontier = await self._link.begin(done)
        rollout, groups = self._config.rollout, self._config.trainer.batch_groups
        symptoms = Symptoms(groups * rollout.group_size, rollout.max_new_tokens, is_new=done == 0)
        await self._publish(done)
        self._shares.lap()
        self._saver.start_clock()
        fetch = self._fetch(done)
        try:
            with MetricsWriter(self._run_dir.path, after_step=done) as writer, self._samples(done) as samples:
                started_s = time.monotonic() - writer.last_wall_s
                for step in range(done, self._config.run.steps):
                    with self._shares.phase("wait"), waiting(f"the batch of step {step}"):
                        batch = await fetch
                    assert batch is not None, "the batch after the last was awaited"
                    if self._overlap:
                        fetch = self._fetch(step + 1)
                    metrics = await self._step(batch)
                    await self._saver.look()
                    if samples is not None:
                        samples.write(batch)
                    line = self._line(step + 1, time.monotonic() - started_s, metrics)
                    self._budget.stepped(line["time/step_s"])
                    told = {"warnings": warnings} if (warnings := symptoms.of(line)) else {}
                    writer.write(line | dict(self._budget.metrics(step + 1)) | told)
                    if self._budget.is_spent:
                        await self._end_early(step + 1)
                        break
                    if not self._overlap:
                        fetch = self._fetch(step + 1)
                await self._saver.finish()
        finally:
            fetch.cancel()
            self._saver.close()
        await self._in_executor(self._trainer.close)

    def _samples(self, done: int) -> AbstractContextManager[SamplesWriter | None]:
        """None where nothing computes, and so nobody writes."""
        # A backend that computes nothing goes with no engine that does.
        if not backend_of(self._config).computes or not engine_of(self._config).samples:
            return nullcontext()
        tokenizer = load_tokenizer(self._config.model)
        return SamplesWriter(self._run_dir.path, tokenizer.decode, after_step=done)

    async def _restore(self) -> int:
        """Go on from the newest checkpoint; its step, or 0."""
        with unhurried("reading the newest checkpoint"):
            checkpoint = await self._in_executor(self._saver.newest)
            if checkpoint is None:
                return 0
            await self._in_executor(self._trainer.restore, checkpoint.path)
        self._scaler.load(checkpoint.state().reward_statistics)
        log.info("going on from %s", checkpoint.path)
        return checkpoint.step

    async def _step(self, batch: Batch) -> dict[str, float]:
        """Train, publish and save; returns everybody's metrics."""
        done = batch.step + 1
        with self._shares.phase("train"):
            total_steps = self._budget.total_steps(batch.step)
            metrics = self._scaler(batch) | await self._in_executor(self._trainer.step, batch, total_steps)
        with self._shares.phase("publish"):
            metrics |= await self._publish(done) | {"schedule/total_steps": total_steps}
        if done == self._config.run.steps or self._saver.is_due(done):
            await self._save(done, metrics["reward/mean"])
        return metrics

    async def _save(self, done: int, reward: float) -> None:
        with self._shares.phase("checkpoint"):
            await self._link.come_to_rest()
            take = partial(self._in_executor, self._trainer.snapshot)
            await self._saver.save(done, reward, take, self._scaler.state())
            if not self._overlap:
                await self._saver.finish()

    async def _end_early(self, done: int) -> None:
        if done < self._config.run.steps:
            log.warning(
                "%.2f GPU hours are spent and another step would exceed run.gpu_hours=%g: the run ends after "
                "%d of %d steps",
                self._budget.spent_gpu_hours,
                self._config.run.gpu_hours,
                done,
                self._config.run.steps,
            )
            if self._saver.last_step != done:
                await self._save(done, math.nan)

    async def _publish(self, version: int) -> dict[str, float]:
        if version < self._frontier:
            return await self._link.publish(version, None, None)
        c = self._config
        wanted = c.weights.canary and engine_of(c).scores_canary
        canary = await self._in_executor(self._trainer.canary) if wanted else None
        return await self._link.publish(version, self._trainer.weights(), canary)

    def _fetch(self, step: int) -> asyncio.Task[Batch | None]:
        # One step more than there are is never asked for: the coordinator would wait for it in vain.
        wanted = self._link.take(step) if step < self._config.run.steps else _nothing()
        return asyncio.create_task(wanted, name=f"fetch the batch of step {step}")

    async def _in_executor(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    def _line(self, step: int, wall_s: float, metrics: dict[str, float]) -> dict[str, float]:
        spent = self._shares.lap()
        trained = metrics["trained_tokens"]
        return {
            "step": step,
            "version": step,
            "wall_s": wall_s,
            **metrics,
            **{f"time/{phase}_s": spent.seconds(phase) for phase in PHASES},
            "time/step_s": spent.total_s,
            "idle/trainer": spent.share("wait"),
            "throughput/trained_tokens_per_s": trained / spent.total_s if spent.total_s else 0.0,
        }


async def _nothing() -> None:
    """The batch after the last."""
