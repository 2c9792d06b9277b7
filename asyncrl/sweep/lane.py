"""A lane of a sweep, seen from the sweep: it runs one cell at a time and leaves no process behind."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from asyncrl.resolve import OWN_PATH

STOP_GRACE_S = 30.0
"""Time between SIGTERM and SIGKILL for a cell; a run of several processes takes 10 seconds or more to
stop."""
LANE_GRACE_S = 5.0
"""Longest time for a lane to end after its cell."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
"""Defaults; each run then sets its own number."""


class Lane:
    """A process that runs cells one at a time. It ends with the `with` block, together with its cell.

    environment: variables in addition to ours. gpus: for each run; None leaves it to the run. thins: keep no
    more of a finished cell than its figures.
    """

    def __init__(self, environment: Mapping[str, str], gpus: int | None, thins: bool = False) -> None:
        self._environment = environment
        self._options = [] if gpus is None else ["--gpus", str(gpus)]
        self._options += ["--thin"] * thins
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Lane:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def run(self, config: Path, output: Path) -> int | None:
        """Exit status of the run, whose output goes to `output`; None if the lane has died with it."""
        if self._process is None:
            self._process = await self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{config}\n{output}\n".encode())
        answer = await self._process.stdout.readline()
        if not answer:
            await self.stop()
            return None
        return int(answer)

    async def stop(self) -> None:
        """End the process, if there is one, and its cell; the next cell gets a new process."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_GRACE_S + LANE_GRACE_S)
        except TimeoutError:
            process.kill()
            await asyncio.wait_for(process.wait(), LANE_GRACE_S)

    async def _start(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "asyncrl.sweep.lane_process", *self._options),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Cells that run side by side must keep to their threads, even while they start.
            env={**os.environ, **OWN_PATH, **ONE_THREAD, **self._environment},
            start_new_session=True,  # we pass Ctrl-C on ourselves
        )
