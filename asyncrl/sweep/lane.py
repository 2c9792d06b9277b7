"""A lane of a sweep, seen from the sweep: it runs one cell at a time and leaves no process behind."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from asyncrl.cluster.hosts.fork_server import ForkServer
from asyncrl.cluster.hosts.local import end_of
from asyncrl.resolve import OWN_PATH

STOP_GRACE_S = 30.0
"""Time between SIGTERM and SIGKILL for a cell; a run of several processes takes 10 seconds or more to
stop."""
LANE_GRACE_S = 5.0
"""Longest time for a lane to end after its cell."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
"""Defaults; each run then sets its own number."""


MODULE = "asyncrl.sweep.lane_process"


class _Process(NamedTuple):
    pid: int
    ended: asyncio.Task[int]
    answers: asyncio.StreamReader
    requests: asyncio.StreamWriter


class Lane:
    """A process that runs cells one at a time. It ends with the `with` block, together with its cell.

    environment: variables in addition to ours. gpus: for each run; None leaves it to the run. thins: keep no
    more of a finished cell than its figures. fork_server: forks the process; without one it imports for
    itself.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        gpus: int | None,
        thins: bool = False,
        fork_server: ForkServer | None = None,
    ) -> None:
        self._environment = environment
        self._options = [] if gpus is None else ["--gpus", str(gpus)]
        self._options += ["--thin"] * thins
        self._fork_server = fork_server
        self._process: _Process | None = None

    async def __aenter__(self) -> Lane:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def run(self, config: Path, output: Path) -> int | None:
        """Exit status of the run, whose output goes to `output`; None if the lane has died with it."""
        if self._process is None:
            self._process = await self._start()
        self._process.requests.write(f"{config}\n{output}\n".encode())
        try:
            answer = await self._process.answers.readline()
        except ConnectionError:  # it has died without having read all of this
            answer = b""
        if not answer:
            await self.stop()
            return None
        return int(answer)

    async def stop(self) -> None:
        """End the process, if there is one, and its cell; the next cell gets a new process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.requests.close()
        done, _ = await asyncio.wait([process.ended], timeout=STOP_GRACE_S + LANE_GRACE_S)
        if not done:
            os.kill(process.pid, signal.SIGKILL)
            await asyncio.wait_for(process.ended, LANE_GRACE_S)

    async def _start(self) -> _Process:
        ours, theirs = socket.socketpair()
        with theirs:
            answers, requests = await asyncio.open_connection(sock=ours)
            # Cells that run side by side must keep to their threads, even while they start.
            environment = {**os.environ, **ONE_THREAD, **self._environment}
            pid = None
            if self._fork_server is not None:
                files = theirs.fileno(), theirs.fileno(), 2
                pid = await self._fork_server.fork(MODULE, self._options, environment, files)
            if pid is not None:
                return _Process(pid, asyncio.create_task(end_of(pid)), answers, requests)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", MODULE, *self._options),
                stdin=theirs,
                stdout=theirs,
                env=environment | OWN_PATH,
                start_new_session=True,  # we pass Ctrl-C on ourselves
            )
            return _Process(process.pid, asyncio.create_task(process.wait()), answers, requests)
