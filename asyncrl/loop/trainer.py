"""The trainer's half of a run around its steps (`loop/algorithm.py`): where it begins, what it asks ahead,
writes down and saves, how it ends."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.data.tokenizer import load_tokenizer
from asyncrl.observe.clock import StepClock
from asyncrl.observe.step_writer import StepWriter
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

T = TypeVar("T")


class TrainerLink(Protocol):
    """The trainer's way to the coordinator and the engines."""

    async def begin(self, version: int) -> int:
        """The trainer has the weights of `version`; what was trained since comes again. Returns the highest
        version that there has been: before it, the engines need no weights."""

    async def take(self, step: int) -> Batch:
        """The batch of a training step, as soon as there is one."""

    async def ready(self, step: int) -> Batch | None:
        """The same where it is there already; None where it would have to be waited for."""

    async def publish(
        self, version: int, weights: PublishedWeights | None, canary: Canary | None
    ) -> dict[str, float]:
        """The step that made a version is done; `weights` for the engines, None where they need none. Returns
        the metrics that the coordinator and the engines have to give, `weights/publish_s` among them."""

    decodes_to_rest = False
    """Whether `come_to_rest` has the engines decode."""

    async def come_to_rest(self) -> None:
        """A checkpoint is about to be made: bring what it cannot hold to an end. By default that is sampled
        anew."""

    async def checkpointed(self, oldest: int) -> None:
        """The trainer will never again begin with a version before `oldest`."""

    ends_because: str | None = None
    """Why no further step is to be done."""

    async def conclude(self) -> dict[str, Any]:
        """All steps are done. Returns what was still to come for the last line of metrics."""
        return {}


class TrainingRun:
    """The training steps of a run, from the newest checkpoint on, for `algorithm.train` to go through.

    executor: where the trainer computes, so that the next batch arrives meanwhile.
    overlap: ask for the next batch before training on this one, and write checkpoints beside the training.
    after_step: called where the trainer computes, between two steps, with the last one's metrics; gives more.
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
        after_step: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None,
    ) -> None:
        self.trainer = trainer
        self.steps = config.run.steps
        self.scale_rewards = RewardScaler(config.reward)
        self.budget = Budget(Usage.load(run_dir.usage), config.run.gpu_hours, config.run.steps)
        self._config = config
        self._link = link
        self._run_dir = run_dir
        self._executor = executor
        self._overlap = overlap
        self._after_step = after_step
        self._saver = CheckpointSaver(
            run_dir, config.checkpoint, link, by_clock=not config.run.in_one_process
        )
        self._clock = StepClock(config, trainer)
        self.phase = self._clock.phase
        self._frontier = 0
        self._reward = math.nan
        """The mean of the last step."""
        self._asked: asyncio.Task[Batch] | None = None
        """For the batch of the next step."""

    @asynccontextmanager
    async def begun(self) -> AsyncIterator[int]:
        """Restore the newest checkpoint and publish its version; gives the steps that are done. At the end of
        the body everything is saved."""
        done = await self._restore()
        self._frontier = await self._link.begin(done)
        self._symptoms = Symptoms.of_run(self._config, self._run_dir.path, done)
        await self.publish(done)
        self._clock.lap()
        self._saver.start_clock()
        try:
            with StepWriter(self._run_dir.path, self._decode(), after_step=done) as self._writer:
                self._started_s = time.monotonic() - self._writer.last_wall_s
                yield done
                await self._saver.finish()
        finally:
            if self._asked is not None:
                self._asked.cancel()
            self._saver.close()
        await self.compute(self.trainer.close)

    async def take(self, step: int) -> Batch:
        """The batch of a step. With `overlap`, the next is asked for at once."""
        with self.phase("wait"), waiting(f"the batch of step {step}"):
            self._asked = self._asked or self._ask(step)
            batch = await self._asked
        # One step more than there are is never asked for: the coordinator would wait for it in vain.
        self._asked = self._ask(step + 1) if self._overlap and step + 1 < self.steps else None
        return batch

    async def compute(self, function: Callable[..., T], *arguments: Any) -> T:
        """What the trainer's thread does."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)

    async def publish(self, version: int) -> dict[str, float]:
        """The trainer's weights as they are, under this version; the others' metrics."""
        if version < self._frontier:
            return await self._link.publish(version, None, None)
        c = self._config
        wanted = c.weights.canary and engine_of(c).scores_canary
        canary = await self.compute(self.trainer.canary) if wanted else None
        return await self._link.publish(version, await self.compute(self.trainer.weights), canary)

    async def save_if_due(self, done: int, reward: float) -> None:
        """reward: the mean of the last step, by which checkpoints are compared."""
        if self._config.needs_checkpoint(done) or self._saver.is_due(done):
            await self._save(done, reward)
        await self._saver.look()

    async def record(self, batch: Batch, metrics: dict[str, float]) -> None:
        """Write what there is to say of a step, which ends here."""
        done = batch.step + 1
        line = {"step": done, "version": done, "wall_s": time.monotonic() - self._started_s}
        line |= metrics | self._clock.metrics(batch, metrics)
        if self._after_step is not None:
            line |= await self.compute(self._after_step, line)
        self.budget.stepped(line["time/step_s"])
        told = {"warnings": warnings} if (warnings := self._symptoms.of(line)) else {}
        self._writer.write(batch, line | dict(self.budget.metrics(done)) | told)
        self._reward = metrics["reward/mean"]

    def goes_on(self, done: int) -> bool:
        """Whether there is a further step to do."""
        return done < self.steps and self._ends_because is None

    @property
    def _ends_because(self) -> str | None:
        return self.budget.why_spent or self._link.ends_because

    async def conclude(self, done: int) -> None:
        """No further step will be done. Writes what was still to come for the last line: that may take long,
        and may be for a line of before the run was resumed."""
        if done < self.steps:
            log.warning("%s: the run ends after %d of %d steps", self._ends_because, done, self.steps)
            if self._saver.last_step != done:
                await self._save(done, self._reward)
        self._writer.amend(await self._link.conclude())

    def _decode(self) -> Callable[..., str] | None:
        """From token ids to text; None where nothing computes, and so nobody writes."""
        # A backend that computes nothing goes with no engine that does.
        if not backend_of(self._config).computes or not engine_of(self._config).samples:
            return None
        return load_tokenizer(self._config.model).decode

    async def _restore(self) -> int:
        """Go on from the newest checkpoint; its step, or 0."""
        with unhurried("reading the newest checkpoint"):
            checkpoint = await self.compute(self._saver.newest)
            if checkpoint is None:
                return 0
            await self.compute(self.trainer.restore, checkpoint.path)
        self.scale_rewards.load(checkpoint.state().reward_statistics)
        log.info("going on from %s", checkpoint.path)
        return checkpoint.step

    async def _save(self, done: int, reward: float) -> None:
        with self.phase("checkpoint"):
            await self._link.come_to_rest()
            take = partial(self.compute, self.trainer.snapshot)
            await self._saver.save(done, reward, take, self.scale_rewards.state())
            if not self._overlap:
                await self._saver.finish()

    def _ask(self, step: int) -> asyncio.Task[Batch]:
        return asyncio.create_task(self._link.take(step), name=f"fetch the batch of step {step}")
