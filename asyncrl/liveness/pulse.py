"""A sign of life of each role, in a small file that its event loop writes about twice per second: what it
waits for, the progress of its work, and its memory. A role whose pulse stops is stopped, deadlocked, or
blocked in C, or a thread of its hangs in a step (`asyncrl.work.stepping`).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from asyncrl.paths import replace_file
from asyncrl.states import CLOCK
from asyncrl.waits import Wait, open_waits
from asyncrl.work import Work, current_unhurried, current_work, longest_step_s

log = logging.getLogger(__name__)

BEAT_S = 0.5
MEASURE_S = 5.0
"""Interval of memory measurements: to find its children, a role must scan all processes."""
MAX_WAITS = 5
MOST_PER_S = 1000
"""Signs of life, of all roles of a kind together, that one process is to hear or to read."""
LONGEST_LOOK_S = 2.0
"""At most this much of the time between two looks at a pulse counts: the observer may have been stopped,
too."""


class Stall(msgspec.Struct, frozen=True):
    """The run makes no progress. Only the coordinator can tell."""

    text: str
    """Who waits for whom, for what, since when."""
    culprits: tuple[str, ...]
    """The roles that block it; empty if that cannot be told."""
    version: int
    """Finished steps. Two stalls with the same number have no step between them."""
    is_final: bool = False
    """Restarting a process would not help: the run must end."""


class Pulse(msgspec.Struct, frozen=True):
    pid: int
    rss_bytes: int
    """Resident memory of the role and everything that it has started."""
    waits: list[Wait]
    """What it waits for, at most `MAX_WAITS`: unavailable services first, then the oldest; empty while it
    works."""
    stall: Stall | None = None
    work: Work | None = None
    """Progress of its computation; None while it does nothing that is counted."""
    unhurried: str | None = None
    """Long work without measurable progress."""
    states_s: dict[str, float] = {}
    """Seconds in each state since its start (`asyncrl.states`); they add up to its age."""
    at_s: float = 0.0
    """Wall-clock time of the last beat: the modification time of the file."""


class Heart:
    """Writes a role's pulse to `path`, which has started with it."""

    def __init__(self, path: Path) -> None:
        CLOCK.leave("start")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._rss_bytes = _rss_bytes()
        self.stall: Stall | None = None

    async def beat(self) -> None:
        """Write the pulse for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._measure())
            while True:
                if longest_step_s() < BEAT_S:
                    self._write()
                await asyncio.sleep(BEAT_S)

    async def _measure(self) -> None:
        while True:
            await asyncio.sleep(MEASURE_S)
            self._rss_bytes = await asyncio.to_thread(_rss_bytes)

    def _write(self) -> None:
        pulse = Pulse(
            os.getpid(),
            self._rss_bytes,
            sorted(open_waits(), key=lambda wait: wait.until_s is None)[:MAX_WAITS],
            self.stall,
            current_work(),
            current_unhurried(),
            dict(CLOCK.seconds()),
        )
        try:
            replace_file(self._path, msgspec.json.encode(pulse))
        except OSError as error:  # even a full disk accepts a new modification time
            log.warning("cannot write %s: %s", self._path, error)
            with suppress(OSError):  # one that fails altogether may work again at the next beat
                if self._path.exists():
                    self._path.touch()


@asynccontextmanager
async def beating(path: Path) -> AsyncIterator[None]:
    """Write the role's pulse while the body runs."""
    beat = asyncio.create_task(Heart(path).beat(), name="pulse")
    try:
        yield
    finally:
        beat.cancel()
        await asyncio.gather(beat, return_exceptions=True)


def read_pulse(path: Path) -> Pulse | None:
    """The latest beat; None before the first."""
    try:
        with path.open("rb") as file:
            pulse = msgspec.json.decode(file.read(), type=Pulse)
            return msgspec.structs.replace(pulse, at_s=os.fstat(file.fileno()).st_mtime)
    except FileNotFoundError:
        return None


def read_pulses(folder: Path) -> dict[str, Pulse]:
    """The pulses of all roles that have one, by role."""
    found = {path.name: read_pulse(path) for path in sorted(folder.glob("*")) if path.suffix != ".new"}
    return {role: pulse for role, pulse in found.items() if pulse is not None}


def every_s(least_s: float, roles: int) -> float:
    """Seconds between two signs of life of each of so many roles, for whoever minds them all."""
    return max(least_s, roles / MOST_PER_S)


def patience(pulse: Pulse, now_s: float) -> Wait | None:
    """The unavailable service that the role still waits for, if any. `now_s` is the wall clock."""
    return next((wait for wait in pulse.waits if wait.until_s is not None and now_s < wait.until_s), None)


@dataclass(slots=True)
class Stillness:
    """For how long a role has had no beat, by the observer's clock: their clocks need not agree."""

    _beat_s: float | None = None
    _looked_s: float = 0.0
    _still_s: float = 0.0

    def look(self, pulse: Pulse, now_s: float) -> float:
        """Seconds without a beat. `now_s` is the observer's monotonic clock."""
        if pulse.at_s != self._beat_s:
            self._beat_s, self._still_s = pulse.at_s, 0.0
        else:
            self._still_s += min(now_s - self._looked_s, LONGEST_LOOK_S)
        self._looked_s = now_s
        return self._still_s


def describe_waits(pulses: Mapping[str, Pulse], now_s: float) -> list[str]:
    """A sentence per role: what it waits for and since when, and the progress of its work. `now_s` is the
    wall clock."""
    return [f"{role} {_describe(pulse, now_s)}." for role, pulse in pulses.items()]


def _describe(pulse: Pulse, now_s: float) -> str:
    oldest: dict[str, Wait] = {}
    for wait in pulse.waits:  # many groups may wait for the same
        oldest.setdefault(wait.what, wait)
    waits = [f"{what} (for {max(0.0, now_s - wait.since_s):.0f} s)" for what, wait in oldest.items()]
    silent_s = now_s - pulse.at_s
    silent = f", and has not moved for {silent_s:.0f} s" if silent_s > 2 * LONGEST_LOOK_S else ""
    work = f", {_how_far(pulse.work, now_s)}" if pulse.work is not None else ""
    work += f", is {pulse.unhurried}" if pulse.unhurried is not None else ""
    return f"waits for {', '.join(waits) or 'nothing'}{work}{silent}"


def _how_far(work: Work, now_s: float) -> str:
    of = "" if work.total is None else f" of {work.total:,}"
    since = "the last" if work.done else "begun"
    return f"has done {work.done:,}{of} {work.what} ({since} {max(0.0, now_s - work.at_s):.0f} s ago)"


def _rss_bytes() -> int:
    total = 0
    process, children = psutil.Process(), list[psutil.Process]()
    with suppress(psutil.Error, OSError):  # such as where others' processes are hidden (`hidepid`)
        children = process.children(recursive=True)
    for one in [process, *children]:
        try:
            total += one.memory_info().rss
        except psutil.Error:
            continue  # it has just ended
    return total
