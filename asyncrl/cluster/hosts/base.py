"""What the supervisor asks of whatever starts roles: processes on this machine, or jobs somewhere else."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from asyncrl.liveness.pulse import Pulse
from asyncrl.resolve import resolve
from asyncrl.runfiles.layout import RunDir

LOG_BYTES = 1 << 20
"""Of a log that are read: what a user's functions print may have become gigabytes."""


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """A role to be started: its name, and what its environment has beside ours."""

    name: str
    env: Mapping[str, str]
    max_restarts: int = 0
    """How often it is started again after a death, within any hour (`asyncrl.liveness.restarts`)."""
    fresh: bool = False
    """It needs a Python of its own, and cannot be forked from one that has imported torch already."""
    node: int = 0
    """Which of the run's nodes it is for; the first is the launcher's own."""
    gpus: tuple[int, ...] = ()
    """Indices of its GPUs among those that the run may use on that node. On the launcher's, `env` names
    them."""


class RoleHandle(Protocol):
    """One start of a role. None of its methods waits."""

    ended: asyncio.Future[int]
    """Its exit status once it is gone; -n where signal n has killed it."""

    def pulse(self) -> Pulse | None:
        """Its newest; None before it has come up."""

    def log(self) -> list[str]:
        """The lines that it has written last (`last_lines`)."""

    def ask_to_end(self) -> None:
        """Politely: it has some seconds to end in good order."""

    def kill(self) -> None:
        """It, and what it has started beside it. Nothing where it is gone."""

    def dump_stacks(self) -> None:
        """Have it write into the run's `stacks` what its threads are doing. Only for one that has a pulse: it
        would end others."""


class RoleHost(Protocol):
    """Starts roles. Every implementation passes `tests/conformance/test_role_host.py`.

    It may have a method `holding(specs)` that returns an asynchronous context manager: what it holds for all
    roles of a run, from before the first start until after the last end. And it may have a method
    `fork_by(server)`, called first: the run's fork server, or None, for roles on this machine.
    """

    async def start(self, spec: RoleSpec) -> RoleHandle:
        """Raises `OSError` where it cannot be started at all."""

    def clear_away(self, names: Collection[str]) -> None:
        """End whatever roles of these names have started and left behind, in sessions of its own too."""


HOSTS = {
    "local": "asyncrl.cluster.hosts.local:LocalHost",
    "ray": "asyncrl.cluster.remote.ray:ray_host",
    "slurm": "asyncrl.cluster.remote.slurm:slurm_host",
}
"""Those that there are, by the names that `run.role_host` knows them by."""


def find_host(spec: str) -> Callable[[RunDir], RoleHost]:
    """One of `HOSTS`, or the user's own. Raises `ConfigError` for one that cannot be imported."""
    return resolve(HOSTS.get(spec, spec), what="run.role_host")


def last_lines(log: Path, start: int = 0) -> list[str]:
    """What a role has written behind `start` in its log, of the end of it `LOG_BYTES` at most; nothing where
    there is no log."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - LOG_BYTES))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def visible_gpu(index: int) -> str:
    """The name in `CUDA_VISIBLE_DEVICES` of the GPU that is this process's number `index`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)
