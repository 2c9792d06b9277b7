"""Starts the roles of an `async` run, notices at once when one dies, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import psutil

from asyncrl.errors import RunFailed
from asyncrl.runtime import messages as m
from asyncrl.runtime.layout import RunDir
from asyncrl.runtime.restarts import WINDOW_S, Restarts
from asyncrl.runtime.role import FATAL, PAST_HELP
from asyncrl.runtime.rpc import RpcClient, RpcError

log = logging.getLogger(__name__)

STARTUP_TIMEOUT_S = 60.0
STOP_GRACE_S = 5.0
"""Between the polite and the hard end of a role."""
TICK_S = 0.2
GIVE_BACK_TIMEOUT_S = 2.0
LOG_TAIL_LINES = 30
ROLE_TAG = "ASYNCRL_ROLE"
"""Environment variable by which all that a role has started, and that its own processes have started, is
known."""


class View(Protocol):
    """Where a person sees the run."""

    def poll(self, status: str) -> None:
        """Called several times a second with what is going on."""

    def event(self, text: str) -> None:
        """Something happened."""


@dataclass(frozen=True, slots=True)
class RoleSpec:
    """A role to be started: `name` as `runtime.roles.entry` takes it, and what its environment has beside
    ours."""

    name: str
    env: Mapping[str, str]
    max_restarts: int = 0
    """How often it is started again after a death, within any hour (`asyncrl.runtime.restarts`)."""


@dataclass(slots=True)
class _Running:
    spec: RoleSpec
    process: asyncio.subprocess.Process
    ended: asyncio.Task[int]
    restarts: Restarts


@dataclass(slots=True)
class Supervisor:
    """Runs roles to the end of the run, and tells `view` what is going on."""

    run_dir: RunDir
    specs: list[RoleSpec]
    view: View
    _roles: dict[str, _Running] = field(default_factory=dict)
    _due: dict[str, tuple[float, _Running]] = field(default_factory=dict)
    """Dead roles that are to be started again, and when (`time.monotonic`)."""

    async def run(self) -> None:
        """Returns when the trainer has ended well. Raises `RunFailed` when the run cannot go on. However it
        ends, no process is left."""
        self.run_dir.logs.mkdir(parents=True, exist_ok=True)
        self._forget_endpoints()
        self.run_dir.make_keys()
        try:
            for spec in self.specs:
                await self._start(spec, Restarts(spec.max_restarts))
            await self._watch()
        finally:
            await self._stop_all()
            self._forget_endpoints()

    async def _watch(self) -> None:
        while True:
            self.view.poll(self._status())
            tasks = {role.ended: role for role in self._roles.values()}
            done, _ = await asyncio.wait(tasks, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
            # The coordinator first: when it falls, the others fall because of it.
            for role in sorted((tasks[task] for task in done), key=lambda r: r.spec.name):
                if await self._ended(role):
                    return
            for name, (due_s, role) in list(self._due.items()):
                if time.monotonic() >= due_s:
                    del self._due[name]
                    await self._start(role.spec, role.restarts)

    async def _ended(self, role: _Running) -> bool:
        """A role's process is gone. Returns True when that ends the run well."""
        name, status = role.spec.name, role.ended.result()
        if name == "trainer-0" and status == 0:
            return True
        if name.startswith(("rollout", "trainer")) and status == 0:
            del self._roles[name]  # the coordinator, or rank 0, has no more work for it
            return False
        recent = role.restarts.recent(time.monotonic())
        delay_s = None if status == PAST_HELP else role.restarts.after_death(time.monotonic())
        if delay_s is None:
            often = f" after {recent} restarts within {WINDOW_S:.0f} s" if recent else ""
            raise RunFailed(f"{name} {_how(status)}{often}. {self._last_words(name)}")
        self.view.event(f"{name} {_how(status)}; starting it again{f' in {delay_s:g} s' if delay_s else ''}")
        del self._roles[name]
        _kill_tagged([self._tag(name)])
        self.run_dir.forget_endpoint(name)
        if name.startswith("rollout"):
            await self._give_leases_back(name)
        self._due[name] = time.monotonic() + delay_s, role
        return False

    async def _start(self, spec: RoleSpec, restarts: Restarts) -> None:
        with self.run_dir.log(spec.name).open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "asyncrl.runtime.role", spec.name),
                *("--run-dir", str(self.run_dir.path), "--supervisor", str(os.getpid())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **spec.env, ROLE_TAG: self._tag(spec.name)},
                start_new_session=True,  # Ctrl-C is ours to pass on, and its children are ours to end
            )
        ended = asyncio.create_task(process.wait(), name=f"end of {spec.name}")
        self._roles[spec.name] = _Running(spec, process, ended, restarts)

    async def _give_leases_back(self, worker: str) -> None:
        """At once, for other workers to take; its successor's hello gives them back as well."""
        endpoint = self.run_dir.endpoint("coordinator")
        if endpoint is None:
            return
        try:
            async with RpcClient(endpoint, "supervisor") as client:
                await client.request(m.WorkerLost(worker), timeout_s=GIVE_BACK_TIMEOUT_S)
        except RpcError as error:
            log.warning("could not tell the coordinator that %s was lost: %s", worker, error)

    def _forget_endpoints(self) -> None:
        self.run_dir.rendezvous.unlink(missing_ok=True)
        self.run_dir.forget_keys()
        for spec in self.specs:
            self.run_dir.forget_endpoint(spec.name)

    def _tag(self, name: str) -> str:
        return f"{self.run_dir.path.resolve()}:{name}"

    async def _stop_all(self) -> None:
        """Ask every role to end, then make it; its process group too, whatever it has started."""
        for role in self._roles.values():
            _signal_group(role.process.pid, signal.SIGTERM)
        tasks = [role.ended for role in self._roles.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_GRACE_S)
        for role in self._roles.values():
            _signal_group(role.process.pid, signal.SIGKILL)
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_GRACE_S)
        _kill_tagged([self._tag(spec.name) for spec in self.specs])
        self._roles.clear()

    def _status(self) -> str:
        if self.run_dir.endpoint("coordinator") is None:
            return "starting the coordinator"
        return f"{', '.join(sorted(self._roles))} running; the first steps take a few seconds"

    def _last_words(self, name: str) -> str:
        """What the role has said last: its message if it had one for people, else the end of its log."""
        path = self.run_dir.log(name)
        lines = path.read_text(errors="replace").splitlines()
        fatal = [i for i, line in enumerate(lines) if line.startswith(FATAL)]
        if fatal:
            return "\n".join(lines[fatal[-1] :]).removeprefix(FATAL) + f"\n(log: {path})"
        return f"The end of {path}:\n" + "\n".join(f"  {line}" for line in lines[-LOG_TAIL_LINES:])


def _kill_tagged(tags: list[str]) -> None:
    """Kill every process of this user that carries one of these tags: what a role started may have sessions
    of its own and survive it."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(ROLE_TAG) in tags:
                process.kill()
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess, OSError):
            continue  # another user's, or gone


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return  # all of it is gone already
