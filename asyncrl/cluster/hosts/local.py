"""Roles as processes of this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Collection, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from asyncrl.cluster.hosts.base import RoleSpec, last_lines
from asyncrl.cluster.hosts.fork_server import ForkServer
from asyncrl.cluster.hosts.processes import DRAIN, ROLE_TAG, kill_tagged, signal_group
from asyncrl.liveness.pulse import Pulse, read_pulse
from asyncrl.resolve import OWN_PATH
from asyncrl.runfiles.layout import RunDir


class LocalRole:
    """A `RoleHandle` of a process that leads its own session.

    log_start: where its words begin in the role's log, behind those of its predecessors.
    """

    def __init__(
        self, run_dir: RunDir, name: str, pid: int, end: Coroutine[Any, Any, int], log_start: int
    ) -> None:
        self.ended: asyncio.Future[int] = asyncio.create_task(end, name=f"end of {name}")
        self._run_dir = run_dir
        self._name = name
        self.pid = pid
        self._log_start = log_start

    def pulse(self) -> Pulse | None:
        pulse = read_pulse(self._run_dir.pulse(self._name))
        return pulse if pulse is not None and pulse.pid == self.pid else None

    def log(self) -> list[str]:
        return last_lines(self._run_dir.log(self._name), self._log_start)

    def ask_to_end(self) -> None:
        signal_group(self.pid, signal.SIGTERM)

    def drain(self) -> None:
        """Ask a rollout worker to hand in what it is at, and take nothing more."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, DRAIN)

    def kill(self) -> None:
        signal_group(self.pid, signal.SIGKILL)

    def dump_stacks(self) -> None:
        with self._run_dir.stacks(self._name).open("a") as file:
            file.write(f"---- {self._name}, process {self.pid}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)


class LocalHost:
    """A `RoleHost`: a Python process for each role, which ends with this one."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._fork_server: ForkServer | None = None

    def fork_by(self, server: ForkServer | None) -> None:
        """It forks the roles that need not be fresh, as long as it lives."""
        self._fork_server = server

    async def start(self, spec: RoleSpec) -> LocalRole:
        arguments = [spec.name, "--run-dir", str(self._run_dir.path), "--supervisor", str(os.getpid())]
        environment = {**os.environ, **spec.env, ROLE_TAG: self._tag(spec.name)}
        module, path = "asyncrl.cluster.role", self._run_dir.log(spec.name)
        with path.open("ab") as output, Path(os.devnull).open("rb") as nothing:
            log_start = output.tell()
            if self._fork_server is not None and not spec.fresh:
                files = nothing.fileno(), output.fileno(), output.fileno()
                pid = await self._fork_server.fork(module, arguments, environment, files)
                if pid is not None:
                    return LocalRole(self._run_dir, spec.name, pid, end_of(pid), log_start)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", module, *arguments),
                stdin=nothing,
                stdout=output,
                stderr=output,
                env=environment | OWN_PATH,
                start_new_session=True,  # Ctrl-C is ours to pass on, and its children are ours to end
            )
        return LocalRole(self._run_dir, spec.name, process.pid, process.wait(), log_start)

    def clear_away(self, names: Collection[str]) -> None:
        kill_tagged([self._tag(name) for name in names])

    def _tag(self, name: str) -> str:
        return f"{self._run_dir.path.resolve()}:{name}"


async def end_of(child: int) -> int:
    """The exit status of a child that asyncio has not started, once it is gone."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    fd = os.pidfd_open(child)
    loop.add_reader(fd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except ChildProcessError:  # somebody else in this process has asked first; asyncio answers the same
        return 255
