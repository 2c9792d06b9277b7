"""Evaluation from the side of the trainer: which versions get a round, and what it is told of them."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.data.prompts import PromptSet
from asyncrl.evaluation.evaluator import evaluating
from asyncrl.evaluation.worker import carry_out
from asyncrl.liveness.pulse import read_pulses
from asyncrl.loop.trainer import TrainerLink
from asyncrl.observe.metrics import FILE_NAME, read_metrics
from asyncrl.roles import EVALUATION, Role
from asyncrl.runfiles.evaluation import Result, Rounds, checkpoints_of
from asyncrl.runfiles.layout import RunDir
from asyncrl.units import format_bytes
from asyncrl.waits import waiting
from asyncrl.work import unhurried

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from torch import Tensor

    from asyncrl.trainer.backend import Trainer
    from asyncrl.weights.canary import Canary
    from asyncrl.weights.published import PublishedWeights

log = logging.getLogger(__name__)

VERSION = "eval/version"
EARLIER = "earlier_rounds"
"""In the last line of a run: what came of rounds before the one that the line itself tells of."""
POLL_S = 0.1
ROOM = 8
"""Versions for which the disk has room at least where one is kept: a checkpoint, with an optimizer's state in
float32, takes almost as much, and without it the run ends."""


class EvaluatedLink(TrainerLink):
    """A trainer's link that keeps the weights of versions to be evaluated, and hands on what came of them.
    Nobody waits for a round before the last step is done.

    executor: where the trainer computes. carry_out: carries out a pending round at once; None where other
    processes do.
    """

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        link: TrainerLink,
        trainer: Trainer,
        executor: Executor | None = None,
        carry_out: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        assert config.evaluation is not None
        self._evaluation = config.evaluation
        self._config = config
        self._run_dir = run_dir
        self._rounds = Rounds(run_dir.evaluation)
        self._link = link
        self._trainer = trainer
        self._executor = executor
        self._carry_out = carry_out
        self._keeping: asyncio.Task[None] | None = None
        """Of weights on their way to the disk."""
        self._told: set[int] = set()
        """Versions whose figures are in `metrics.jsonl`."""
        self._begun_with = self._version = 0
        self._results: dict[int, Result] = {}
        self._read_bytes = 0
        """Of the results."""

    async def begin(self, version: int) -> int:
        path = self._run_dir.path / FILE_NAME
        lines = read_metrics(path) if path.exists() else []
        told = [each for line in lines if line["step"] <= version for each in (line, *line.get(EARLIER, ()))]
        self._told = {each[VERSION] for each in told if VERSION in each}
        self._rounds.trained.unlink(missing_ok=True)
        self._begun_with = version
        return await self._link.begin(version)

    async def take(self, step: int) -> Batch:
        return await self._link.take(step)

    async def ready(self, step: int) -> Batch | None:
        return await self._link.ready(step)

    async def publish(
        self, version: int, weights: PublishedWeights | None, canary: Canary | None
    ) -> dict[str, float]:
        await self._have_kept()  # what follows may not come again
        metrics = await self._link.publish(version, weights, canary)
        self._version = version
        if weights is not None and self._evaluation.is_due(version, self._config.run.steps):
            self._keep(version)
        await self._carry_out_here()
        # The line of the step that a run begins with is written already.
        return metrics | (next(self._news(), {}) if version > self._begun_with else {})

    async def come_to_rest(self) -> None:
        await self._link.come_to_rest()

    async def checkpointed(self, oldest: int) -> None:
        await self._link.checkpointed(oldest)

    async def conclude(self) -> dict[str, Any]:
        """Score the last version, whichever it has become, and wait for the rounds that are not done, as long
        as something moves."""
        self._keep(self._version)
        await self._carry_out_here()
        await self.rounds_done()
        news = [*self._news()]
        last = (news[-1] | {EARLIER: news[:-1]} if news[:-1] else news[0]) if news else {}
        return await self._link.conclude() | last

    def _keep(self, version: int) -> None:
        """Begin to keep the weights as they are, unless there is, or was, a round of this version. Whatever
        the trainer is to do next comes after the copy."""
        if self._keeping is not None or self._rounds.is_known(version):
            return
        copy = asyncio.get_running_loop().run_in_executor(self._executor, self._copied)

        async def write() -> None:
            weights = await copy
            size = sum(tensor.nbytes for tensor in weights.values())
            if (free := shutil.disk_usage(self._run_dir.path).free) < ROOM * size:
                log.warning(
                    "version %d is not evaluated: the weights of %d versions wait for that in %s, and the "
                    "disk has %s left; raise evaluation.every_steps or evaluation.workers, or make room",
                    version,
                    len(self._rounds.pending()),
                    self._rounds.path,
                    format_bytes(free),
                )
                return
            await asyncio.to_thread(self._rounds.keep, version, weights)

        self._keeping = asyncio.create_task(write(), name=f"keep version {version}")

    async def _carry_out_here(self) -> None:
        if self._carry_out is not None:
            await self._have_kept()
            for pending in self._rounds.pending():
                await self._carry_out(pending)

    def _copied(self) -> dict[str, Tensor]:
        parts = self._trainer.weights().parts()
        return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in parts}

    async def _have_kept(self) -> None:
        if self._keeping is not None:
            with waiting("the weights of a version to be kept for its evaluation"):
                await self._keeping
            self._keeping = None

    def _news(self) -> Iterator[dict[str, float]]:
        """The figures of rounds that have not been told, the oldest first; what is taken is told."""
        if (size := self._rounds.results_bytes) != self._read_bytes:
            self._results, self._read_bytes = self._rounds.results(), size
        # One that goes on from a checkpoint has scored versions that are still to come again.
        results = {version: result for version, result in self._results.items() if version <= self._version}
        metric, patience = self._config.checkpoint.best_of, self._evaluation.patience
        values = [r.metrics[metric] for r in results.values() if metric in r.metrics]
        if patience is not None and has_no_rise(values, patience):
            what = f"in {patience} evaluated versions (evaluation.patience)"
            self.ends_because = f"{metric} has not risen {what}"
        for version, result in results.items():
            if version not in self._told:
                self._told.add(version)
                yield result.told()

    async def rounds_done(self) -> None:
        """Wait for what is still to be scored, unless nothing moves any more."""
        run, moved_s, seen, what = (
            self._config.run,
            time.monotonic(),
            None,
            "the evaluation of the last versions",
        )
        await self._have_kept()
        self._rounds.trained.touch()
        with unhurried(f"waiting for {what}"), waiting(what):
            while pending := self._rounds.pending():
                pulses = read_pulses(self._run_dir.pulses)
                works = {r: pulse.work for r, pulse in pulses.items() if Role.parse(r).kind == EVALUATION}
                if (pending, works) != seen:
                    seen, moved_s = (pending, works), time.monotonic()
                still_s = time.monotonic() - moved_s
                if still_s > (run.stall_s if works else run.start_s):
                    without = ", ".join(map(str, pending))
                    log.warning(
                        "the run ends without %s: %s has not moved for %.0f s", without, what, still_s
                    )
                    return
                await asyncio.sleep(POLL_S)


def has_no_rise(values: Sequence[float], patience: int) -> bool:
    """Whether the last `patience` values are none above all that were before them."""
    return len(values) > patience and max(values[-patience:]) <= max(values[:-patience])


@asynccontextmanager
async def evaluated(
    config: Config, run_dir: RunDir, link: TrainerLink, trainer: Trainer, executor: Executor | None = None
) -> AsyncIterator[TrainerLink]:
    """The trainer's link while the body trains, with evaluation where the config asks for it: by processes of
    their own, or in this one. executor: where the trainer computes. At the end of the body all is done."""
    if config.evaluation is None:
        yield link
        return
    async with AsyncExitStack() as stack:
        here = None
        if config.run.in_one_process:
            rounds = Rounds(run_dir.evaluation)
            prompts = PromptSet.load(rounds.prompts)
            evaluator = await stack.enter_async_context(evaluating(config, prompts))
            here = partial(carry_out, evaluator, rounds)
        wrapped = EvaluatedLink(config, run_dir, link, trainer, executor, here)
        yield wrapped
        await wrapped.rounds_done()
        checkpoints_of(run_dir, config.checkpoint).rotate()  # all are known now by which they are compared
