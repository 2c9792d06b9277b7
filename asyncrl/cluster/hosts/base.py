"""What the supervisor asks of whatever starts roles: processes on this machine, or jobs somewhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from asyncrl.liveness.pulse import Pulse
from asyncrl.resolve import resolve
from asyncrl.runfiles.layout import RunDir


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """A role to be started: its name, and what its environment has beside ours."""

    name: str
    env: Mapping[str, str]
    max_restarts: int = 0
    """How often it is started again after a death, within any hour (`asyncrl.liveness.restarts`)."""
    fresh: bool = False
    """It needs a Python of its own, and cannot be forked from one that has imported torch already."""


class RoleHandle(Protocol):
    """One start of a role. None of its methods waits."""

    ended: asyncio.Future[int]
    """Its exit status once it is gone; -n where signal n has killed it."""

    def pulse(self) -> Pulse | None:
        """Its newest; None before it has come up."""

    def log(self) -> list[str]:
        """The lines that it has written."""

    def ask_to_end(self) -> None:
        """Politely: it has some seconds to end in good order."""

    def kill(self) -> None:
        """It, and what it has started beside it. Nothing where it is gone."""

    def dump_stacks(self) -> None:
        """Have it write into the run's `stacks` what its threads are doing. Only for one that has a pulse: it
        would end others."""


class RoleHost(Protocol):
    """Starts roles. Every implementation passes `tests/conformance/test_role_host.py`."""

    async def start(self, spec: RoleSpec) -> RoleHandle:
        """Raises `OSError` where it cannot be started at all."""

    def clear_away(self, names: Collection[str]) -> None:
        """End whatever roles of these names have started and left behind, in sessions of its own too."""


HOSTS = {"local": "asyncrl.cluster.hosts.local:LocalHost"}
"""Those that there are, by the names that `run.role_host` knows them by."""


def find_host(spec: str) -> Callable[[RunDir], RoleHost]:
    """One of `HOSTS`, or the user's own. Raises `ConfigError` for one that cannot be imported."""
    return resolve(HOSTS.get(spec, spec), what="run.role_host")
