"""Writes checkpoints while the training goes on: a thread writes what the trainer has copied."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from asyncrl.config import CheckpointConfig
from asyncrl.runfiles.checkpoint_pace import interval_s
from asyncrl.runfiles.checkpoints import Checkpoint, CheckpointState
from asyncrl.runfiles.evaluation import checkpoints_of
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.store import copy_ledger
from asyncrl.waits import waiting
from asyncrl.work import unhurried

if TYPE_CHECKING:
    from asyncrl.trainer.backend import Snapshot


class Listener(Protocol):
    async def checkpointed(self, oldest: int) -> None:
        """The run will never restart from before this step."""


class CheckpointSaver:
    """Writes one checkpoint at a time. The next call raises an error of the writing thread.

    by_clock: if the config leaves the interval open, decide by the clock. now_s: a monotonic clock.
    """

    def __init__(
        self,
        run_dir: RunDir,
        config: CheckpointConfig,
        listener: Listener,
        *,
        by_clock: bool,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_dir = run_dir
        self._checkpoints = checkpoints_of(run_dir, config)
        self._every_steps = config.every_steps
        self._listener = listener
        self._by_clock = by_clock
        self._now_s = now_s
        self._since_s = now_s()
        self._pause_s = self._writing_s = 0.0
        """Time that the last checkpoint took from the training and in the writing thread."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: asyncio.Task[None] | None = None
        self.last_step: int | None = None
        """Step of the last checkpoint that was started, or gone on from."""

    def newest(self) -> Checkpoint | None:
        """The checkpoint to continue from. Raises `CheckpointError` if all are damaged."""
        checkpoint = self._checkpoints.newest_whole()
        self.last_step = None if checkpoint is None else checkpoint.step
        return checkpoint

    def start_clock(self) -> None:
        """The training starts now."""
        self._since_s = self._now_s()

    def is_due(self, step: int) -> bool:
        """Whether to write a checkpoint after `step` steps, if this is not the last."""
        if self._every_steps is not None:
            return self._every_steps > 0 and step % self._every_steps == 0
        since_s = self._now_s() - self._since_s
        return self._by_clock and since_s >= interval_s(self._pause_s, self._writing_s)

    async def save(
        self,
        step: int,
        reward: float,
        take: Callable[[], Awaitable[Snapshot]],
        statistics: dict[str, dict[str, float]],
    ) -> None:
        """Start writing the state after `step` steps. `take` copies it, once the previous checkpoint is
        written, so that there is only one copy at a time."""
        self._since_s = self._now_s()
        await self.finish()
        self.last_step = step
        self._writing = asyncio.create_task(
            self._write(step, None if math.isnan(reward) else reward, await take(), statistics),
            name=f"write the checkpoint of step {step}",
        )
        self._pause_s = self._now_s() - self._since_s

    async def look(self) -> None:
        """Raise the error of a failed checkpoint as soon as it is known."""
        if self._writing is not None and self._writing.done():
            await self.finish()

    async def finish(self) -> None:
        """Wait until the checkpoint in progress is written."""
        if self._writing is not None:
            begun_s = self._now_s()
            with waiting(f"the checkpoint of step {self.last_step} to be written"):
                await self._writing
            self._writing = None
            self._pause_s += self._now_s() - begun_s

    def close(self) -> None:
        """Abandon a checkpoint in progress."""
        if self._writing is not None:
            self._writing.cancel()
        self._thread.shutdown(wait=False)

    async def _write(
        self, step: int, reward: float | None, snapshot: Snapshot, statistics: dict[str, dict[str, float]]
    ) -> None:
        def fill(folder: Path) -> None:
            snapshot.write(folder)
            copy_ledger(self._run_dir.ledger, folder / "ledger.db", from_step=step)

        def write() -> None:
            state = CheckpointState(step, reward, snapshot.weights_hash(), statistics)
            self._checkpoints.write(state, fill)

        begun_s = self._now_s()
        with unhurried(f"writing the checkpoint of step {step}"):
            await asyncio.get_running_loop().run_in_executor(self._thread, write)
        self._writing_s = self._now_s() - begun_s
        await self._listener.checkpointed(self._checkpoints.oldest_to_begin_with)
