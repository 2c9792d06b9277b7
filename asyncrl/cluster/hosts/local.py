"""Roles as processes of this machine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress

import psutil

from asyncrl.cluster.hosts.base import RoleSpec
from asyncrl.liveness.pulse import Pulse, read_pulse
from asyncrl.resolve import OWN_PATH
from asyncrl.runfiles.layout import RunDir

ROLE_TAG = "ASYNCRL_ROLE"
"""Environment variable by which all that a role has started, and that its own processes have started, is
known."""


class LocalRole:
    """A `RoleHandle` of a process that leads its own session.

    log_start: where its words begin in the role's log, behind those of its predecessors.
    """

    def __init__(
        self, run_dir: RunDir, name: str, process: asyncio.subprocess.Process, log_start: int
    ) -> None:
        self.ended: asyncio.Future[int] = asyncio.create_task(process.wait(), name=f"end of {name}")
        self._run_dir = run_dir
        self._name = name
        self._pid = process.pid
        self._log_start = log_start

    def pulse(self) -> Pulse | None:
        pulse = read_pulse(self._run_dir.pulse(self._name))
        return pulse if pulse is not None and pulse.pid == self._pid else None

    def log(self) -> list[str]:
        with self._run_dir.log(self._name).open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode(errors="replace").splitlines()

    def ask_to_end(self) -> None:
        signal_group(self._pid, signal.SIGTERM)

    def kill(self) -> None:
        signal_group(self._pid, signal.SIGKILL)

    def dump_stacks(self) -> None:
        with self._run_dir.stacks(self._name).open("a") as file:
            file.write(f"---- {self._name}, process {self._pid}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGUSR1)


class LocalHost:
    """A `RoleHost`: a Python process for each role, which ends with this one."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir

    async def start(self, spec: RoleSpec) -> LocalRole:
        with self._run_dir.log(spec.name).open("ab") as output:
            log_start = output.tell()
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "asyncrl.cluster.role", spec.name),
                *("--run-dir", str(self._run_dir.path), "--supervisor", str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **OWN_PATH, **spec.env, ROLE_TAG: self._tag(spec.name)},
                start_new_session=True,  # Ctrl-C is ours to pass on, and its children are ours to end
            )
        return LocalRole(self._run_dir, spec.name, process, log_start)

    def clear_away(self, names: Collection[str]) -> None:
        kill_tagged([self._tag(name) for name in names])

    def _tag(self, name: str) -> str:
        return f"{self._run_dir.path.resolve()}:{name}"


def signal_group(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process and to all that it has started in its own session."""
    with suppress(ProcessLookupError):  # all of it may be gone already
        os.killpg(pid, number)


def kill_tagged(tags: Collection[str]) -> None:
    """Kill every process of this user that carries one of these tags: what a role started may have sessions
    of its own and survive it."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(ROLE_TAG) in tags:
                process.kill()
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess, OSError):
            continue  # another user's, or gone
