"""Starts the roles of an `async` run, notices at once when one dies, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from asyncrl.cluster.hosts.base import RoleHandle, RoleHost, RoleSpec
from asyncrl.cluster.kinds import RoleKind, kind_of
from asyncrl.cluster.role import BAD_WEIGHTS, FATAL, NO_ROOM, PAST_HELP
from asyncrl.config import RunConfig
from asyncrl.errors import RunFailed
from asyncrl.liveness.pulse import Pulse, Stall, Stillness, patience
from asyncrl.liveness.restarts import COORDINATOR_START_S, WINDOW_S, Restarts
from asyncrl.liveness.status import WAITS_FOR_TURN, read_beginning, status_of
from asyncrl.roles import COORDINATOR, RANK_0, SUPERVISOR
from asyncrl.runfiles.layout import RunDir
from asyncrl.units import format_bytes
from asyncrl.waits import Wait
from asyncrl.wire import messages as m
from asyncrl.wire.rpc import RpcClient, RpcError

if TYPE_CHECKING:
    from asyncrl.cluster.remote.desk import RemoteRole

log = logging.getLogger(__name__)

STOP_GRACE_S = 5.0
"""Between the polite and the hard end of a role."""
TICK_S = 0.2
GIVE_BACK_TIMEOUT_S = 2.0
STACKS_S = 0.5
"""For a role to write its stacks."""
CAUSE_S = 0.5
"""For the end of a rank that was killed to be noticed, where another that fell with it was noticed first."""
LOG_TAIL_LINES = 30
MAX_WHY_CHARS = 300


class View(Protocol):
    """Where a person sees the run."""

    def poll(self, status: str) -> None:
        """Called several times a second with what is going on."""

    def event(self, text: str) -> None:
        """Something happened."""


class Guests(Protocol):
    """Where workers come unasked (`cluster.remote.desk.Desk`)."""

    def arrived(self) -> Sequence[tuple[str, RemoteRole]]:
        """Those that have come since the last call, each after where it comes from."""


@dataclass(slots=True)
class _Unit:
    """What is started together: a role, or all of a kind that are one unit."""

    kind: RoleKind
    restarts: Restarts
    specs: list[RoleSpec] = field(default_factory=list)
    due_s: float | None = None
    """When it is to be started again (`time.monotonic`), if it is dead."""
    is_guest: bool = False
    """It has come unasked, and may go as it likes."""

    @property
    def names(self) -> list[str]:
        return [spec.name for spec in self.specs]


@dataclass(slots=True)
class _Running:
    unit: _Unit
    name: str
    handle: RoleHandle
    started_s: float = field(default_factory=time.monotonic)
    """When its start began, or went on after it had to wait for others."""
    stillness: Stillness = field(default_factory=Stillness)
    condemned: str | None = None
    """Why it was killed, if we did it."""

    @property
    def status(self) -> int:
        """How it has ended."""
        return self.handle.ended.result()

    @property
    def is_past_help(self) -> bool:
        return self.status in (PAST_HELP, NO_ROOM)


@dataclass(slots=True)
class Supervisor:
    """Runs roles to the end of the run, replaces what dies or hangs, and tells `view` what is going on."""

    run_dir: RunDir
    host: RoleHost
    specs: list[RoleSpec]
    run_config: RunConfig
    view: View
    guests: Guests | None = None
    _roles: dict[str, _Running] = field(default_factory=dict)
    _been_up: set[str] = field(default_factory=set)
    """Roles that have had a pulse in this run."""
    _stall: Stall | None = None
    """The last one."""
    _away: dict[str, Wait] = field(default_factory=dict)
    """What roles were last seen to have patience for."""

    async def run(self) -> None:
        """Returns when the trainer has ended well. Raises `RunFailed` when the run cannot go on. However it
        ends, no process is left."""
        self.run_dir.logs.mkdir(parents=True, exist_ok=True)
        # Where a launcher was killed, what it had started may live a while longer, and would write and unlink
        # what is this run's now.
        self.host.clear_away([spec.name for spec in self.specs])
        self._forget_files()
        self.run_dir.make_keys()
        try:
            units = _units(self.specs)
            for unit in units:
                await self._start(unit)
            await self._watch(units)
        finally:
            try:
                await self._stop_all()
            finally:
                self._forget_files()

    async def _watch(self, units: list[_Unit]) -> None:
        while True:
            self.view.poll(self._status())
            if running := [role.handle.ended for role in self._roles.values()]:
                await asyncio.wait(running, timeout=TICK_S, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(TICK_S)
            for role in sorted((r for r in self._roles.values() if r.handle.ended.done()), key=_precedence):
                if self._roles.get(role.name) is role and await self._ended(await self._cause(role)):
                    return
            await self._look_after_pulses()
            for origin, handle in self.guests.arrived() if self.guests is not None else ():
                unit = _Unit(kind_of(handle.spec.name), Restarts(0), [handle.spec], is_guest=True)
                self._roles[handle.spec.name] = _Running(unit, handle.spec.name, handle)
                self.view.event(f"{handle.spec.name} joins {origin}")
            for unit in units:
                if unit.due_s is not None and time.monotonic() >= unit.due_s:
                    await self._start(unit)

    # ---- deaths --------------------------------------------------------------------------------------------

    async def _cause(self, role: _Running) -> _Running:
        """Who of its unit is to be told of. One that was killed takes the others with it, and may yet be
        noticed after them."""
        members = [other for other in self._roles.values() if other.unit is role.unit]
        if len(members) > 1 and role.status > 0 and not role.is_past_help:
            await asyncio.wait([member.handle.ended for member in members], timeout=CAUSE_S)
        return min((member for member in members if member.handle.ended.done()), key=_precedence)

    async def _ended(self, role: _Running) -> bool:
        """A role's process is gone. Returns True when that ends the run well."""
        name, unit, status = role.name, role.unit, role.status
        if unit.is_guest:
            self.view.event(f"{name} has left: it {role.condemned or how_it_ended(status)}")
            await self._clear_away(unit)
            return False
        if status == 0 and unit.kind.may_finish:
            del self._roles[name]
            return name == RANK_0
        how = role.condemned or how_it_ended(status)
        recent = unit.restarts.recent(time.monotonic())
        delay_s = None if self._would_end_so_again(role) else unit.restarts.after_death(time.monotonic())
        if delay_s is None:
            often = f" after {recent} restarts within {WINDOW_S:.0f} s" if recent else ""
            if unit.kind.is_needed:
                raise RunFailed(f"{name} {how}{often}. {self._last_words(role)}")
            self.view.event(f"{name} {how}{often}; the run goes on without it. {self._last_words(role)}")
            await self._clear_away(unit)
            return False
        it = f"all of the {unit.kind.name}" if unit.kind.is_unit else "it"
        then = f"replacing {it}" if role.condemned else f"starting {it} again"
        log_lines = role.handle.log() if status > 0 else []
        why = f" ({log_lines[-1][:MAX_WHY_CHARS]})" if log_lines else ""
        self.view.event(f"{name} {how}{why}; {then}{f' in {delay_s:g} s' if delay_s else ''}")
        if status == BAD_WEIGHTS and RANK_0 in self._roles:
            # They stay what they are until the next version, and that may need this very worker.
            self._kill([self._roles[RANK_0]], "has shared weights that are damaged")
        await self._clear_away(unit)
        unit.due_s = time.monotonic() + delay_s
        return False

    def _would_end_so_again(self, role: _Running) -> bool:
        self._note_pulse(role)
        never_up = role.unit.kind.must_start and role.name not in self._been_up
        return role.is_past_help or (never_up and role.status > 0)

    async def _clear_away(self, unit: _Unit) -> None:
        """End what is left of a unit, and forget what its successors must not find."""
        fallen = [self._roles.pop(name) for name in unit.names if name in self._roles]
        for role in fallen:
            role.handle.kill()
        await asyncio.wait([role.handle.ended for role in fallen], timeout=STOP_GRACE_S)
        self.host.clear_away(unit.names)
        for name in unit.names:
            self.run_dir.forget_process(name, keep_endpoint=unit.kind.keeps_place)
            if unit.kind.holds_leases:
                await self._give_leases_back(name)
        if unit.kind.is_unit:
            self.run_dir.rendezvous.unlink(missing_ok=True)

    async def _start(self, unit: _Unit) -> None:
        unit.due_s = None
        for spec in unit.specs:
            self._roles[spec.name] = _Running(unit, spec.name, await self.host.start(spec))

    # ---- hangs and stalls ----------------------------------------------------------------------------------

    async def _look_after_pulses(self) -> None:
        """Replace what has not come up in time or not moved for too long, and see what the coordinator has to
        say of a stall."""
        now_s = time.monotonic()
        for role in list(self._roles.values()):
            pulse = self._note_pulse(role)
            if role.condemned is not None:
                continue
            if pulse is None and self._beginning(role.name) == WAITS_FOR_TURN:
                role.started_s = now_s
            still_s = None if pulse is None else role.stillness.look(pulse, now_s)
            why = why_lost(role.name, now_s - role.started_s, still_s, self.run_config)
            if why is not None:
                await self._dump_stacks([role])
                self._kill([role], why)
            elif pulse is not None and pulse.stall is not None and pulse.stall != self._stall:
                await self._stalled(pulse.stall)
            if pulse is not None:
                self._tell_of_patience(role.name, patience(pulse, time.time()))

    def _tell_of_patience(self, name: str, wait: Wait | None) -> None:
        """That a role waits for what is away, and that it has come back or is given up."""
        before = self._away.pop(name, None)
        if wait is not None:
            self._away[name] = wait
        if wait is not None and wait.until_s is not None and (before is None or before.what != wait.what):
            since_s, left_s = time.time() - wait.since_s, wait.until_s - time.time()
            self.view.event(
                f"{wait.what} is away: {name} has asked again for {since_s:.0f} s, and will for "
                f"{left_s:.0f} s more (patience_s); the run waits"
            )
        elif before is not None and wait is None:
            self.view.event(f"{name} no longer waits for {before.what}")

    async def _stalled(self, stall: Stall) -> None:
        before, self._stall = self._stall, stall
        again = before is not None and before.version == stall.version
        if again or stall.is_final or self.run_config.on_stall == "end":
            await self._dump_stacks(list(self._roles.values()))
            stacks = f"(what every process was doing: {self.run_dir.stacks('*')})"
            raise RunFailed(f"{stall.text}\n{stacks}")
        self.view.event(stall.text)
        await self._dump_stacks(list(self._roles.values()))
        culprits = [self._roles[name] for name in stall.culprits if name in self._roles]
        self._kill(culprits, f"holds up step {stall.version}")

    def _kill(self, roles: list[_Running], reason: str) -> None:
        for role in roles:
            role.condemned = reason
            role.handle.kill()

    async def _dump_stacks(self, roles: list[_Running]) -> None:
        """Have roles write what their threads are doing. Those that are still starting are not asked: the
        signal would end them."""
        asked = [role for role in roles if self._note_pulse(role) is not None]
        for role in asked:
            role.handle.dump_stacks()
        if asked:
            await asyncio.sleep(STACKS_S)

    def _note_pulse(self, role: _Running) -> Pulse | None:
        """The pulse of this very start, once it has one."""
        pulse = role.handle.pulse()
        if pulse is not None:
            self._been_up.add(role.name)
        return pulse

    # ---- helpers -------------------------------------------------------------------------------------------

    async def _give_leases_back(self, worker: str) -> None:
        """At once, for other workers to take; its successor's hello gives them back as well."""
        endpoint = self.run_dir.endpoint(COORDINATOR)
        if endpoint is None or COORDINATOR not in self._roles:
            return
        try:
            async with RpcClient(endpoint, SUPERVISOR) as client:
                await client.request(m.WorkerLost(worker), timeout_s=GIVE_BACK_TIMEOUT_S)
        except RpcError as error:
            log.warning("could not tell the coordinator that %s was lost: %s", worker, error)

    def _forget_files(self) -> None:
        """What is of this start of the run only."""
        shutil.rmtree(self.run_dir.pulses, ignore_errors=True)
        shutil.rmtree(self.run_dir.beginnings, ignore_errors=True)
        self.run_dir.rendezvous.unlink(missing_ok=True)
        self.run_dir.forget_keys()
        for spec in self.specs:
            self.run_dir.forget_process(spec.name)

    async def _stop_all(self) -> None:
        """Ask every role to end, then make it; its process group too, whatever it has started. Who is
        interrupted again meanwhile makes it at once: nothing of this run may live when it is continued."""
        for role in self._roles.values():
            role.handle.ask_to_end()
        tasks = [role.handle.ended for role in self._roles.values()]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=STOP_GRACE_S)
        finally:
            for role in self._roles.values():
                role.handle.kill()
            try:
                if tasks:
                    await asyncio.wait(tasks, timeout=STOP_GRACE_S)
            finally:
                self.host.clear_away([spec.name for spec in self.specs])
                self._roles.clear()

    def _status(self) -> str:
        pulses = {name: self._note_pulse(role) for name, role in self._roles.items()}
        beginnings = {name: self._beginning(name) for name, pulse in pulses.items() if not pulse}
        return status_of(beginnings, pulses.get(RANK_0))

    def _beginning(self, name: str) -> str:
        """What a role is doing that has no pulse yet."""
        return read_beginning(self.run_dir.beginning(name))

    def _last_words(self, role: _Running) -> str:
        """What the role has said last: its message if it had one for people, else the end of its log."""
        if role.status == NO_ROOM:
            return (
                f"No room is left on a disk that it writes to (that of {self.run_dir.path} has "
                f"{format_bytes(shutil.disk_usage(self.run_dir.path).free)} free). Make room, then go on: "
                f"asyncrl-launch --resume {self.run_dir.path}"
            )
        path, lines = self.run_dir.log(role.name), role.handle.log()
        fatal = [i for i, line in enumerate(lines) if line.startswith(FATAL)]
        if fatal:
            return "\n".join(lines[fatal[-1] :]).removeprefix(FATAL) + f"\n(log: {path})"
        return f"The end of {path}:\n" + "\n".join(f"  {line}" for line in lines[-LOG_TAIL_LINES:])


def why_lost(name: str, age_s: float, still_s: float | None, run: RunConfig) -> str | None:
    """Why a role that lives is given up, if it is. age_s: since its start. still_s: without a beat of its
    pulse; None before the first. The others wait for a coordinator for `COORDINATOR_START_S` at most."""
    if still_s is not None:
        return f"has not moved for {still_s:.0f} s" if still_s > run.hang_s else None
    allowed_s = min(run.start_s, COORDINATOR_START_S) if kind_of(name).is_hub else run.start_s
    return f"has not come up within {allowed_s:.0f} s" if age_s > allowed_s else None


def _precedence(role: _Running) -> tuple[bool, ...]:
    """Of deaths that are noticed together, the first is the likely cause of the others: a good end, the
    coordinator's, one that is past help, one by a signal."""
    return role.status != 0, not role.unit.kind.is_hub, not role.is_past_help, role.status > 0


def how_it_ended(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _units(specs: Iterable[RoleSpec]) -> list[_Unit]:
    units: dict[str, _Unit] = {}
    for spec in specs:
        kind = kind_of(spec.name)
        name = kind.name if kind.is_unit else spec.name
        units.setdefault(name, _Unit(kind, Restarts(spec.max_restarts))).specs.append(spec)
    return list(units.values())
