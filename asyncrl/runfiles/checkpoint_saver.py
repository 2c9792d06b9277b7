"""Makes checkpoints beside the training: what the trainer copied is written in a thread of its own."""

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
from asyncrl.runfiles.checkpoints import Checkpoint, Checkpoints, CheckpointState
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.store import copy_ledger
from asyncrl.waits import waiting
from asyncrl.work import unhurried

if TYPE_CHECKING:
    from asyncrl.trainer.backend import Snapshot


class Listener(Protocol):
    async def checkpointed(self, oldest: int) -> None:
        """No run will begin before this step again."""


class CheckpointSaver:
    """One checkpoint is made at a time. An error of the writing thread comes out of the next call.

    by_clock: where the config leaves open when to make one, the clock tells. now_s: a monotonic one.
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
        self._checkpoints = Checkpoints(run_dir.checkpoints, config.keep_last, config.keep_best)
        self._every_steps = config.every_steps
        self._listener = listener
        self._by_clock = by_clock
        self._now_s = now_s
        self._since_s = now_s()
        self._pause_s = self._writing_s = 0.0
        """What the last checkpoint took, of the training and of the writing thread."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: asyncio.Task[None] | None = None
        self.last_step: int | None = None
        """Of the last checkpoint that was begun."""

    def newest(self) -> Checkpoint | None:
        """What to go on from. Raises `CheckpointError` when there is nothing but damaged ones."""
        return self._checkpoints.newest_whole()

    def start_clock(self) -> None:
        """The training begins now."""
        self._since_s = self._now_s()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is to be made after so many steps, were it not the last."""
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
        """Begin to write the state after `step` steps, which `take` copies. That is done once the checkpoint
        before is written, so that there is one copy at a time."""
        self._since_s = self._now_s()
        await self.finish()
        self.last_step = step
        self._writing = asyncio.create_task(
            self._write(step, None if math.isnan(reward) else reward, await take(), statistics),
            name=f"write the checkpoint of step {step}",
        )
        self._pause_s = self._now_s() - self._since_s

    async def look(self) -> None:
        """Raises what has kept the last checkpoint from being written, as soon as that is known."""
        if self._writing is not None and self._writing.done():
            await self.finish()

    async def finish(self) -> None:
        """Wait until what was begun is written."""
        if self._writing is not None:
            with waiting(f"the checkpoint of step {self.last_step} to be written"):
                await self._writing
            self._writing = None

    def close(self) -> None:
        """What is not written will not be."""
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
