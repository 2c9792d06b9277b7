"""What a container leaves of the machine, by the files of its control groups."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = PurePosixPath("/sys/fs/cgroup")
_MEMBERSHIP = PurePosixPath("/proc/self/cgroup")
_NO_LIMIT_BYTES = 1 << 60
"""Version 1 writes "no limit" as the largest number of whole pages."""

Read = Callable[[PurePosixPath], str | None]
"""The text of a file, None where it cannot be read."""


def _read(path: PurePosixPath) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a container may use; None where there is no limit."""

    cpus: float | None
    """CPU seconds a second."""
    memory_bytes: int | None

    def cores(self, allowed: Collection[int] = ()) -> int:
        """Cores that can be kept busy, of those that a process is allowed to compute on: their numbers, none
        where the system lets nobody choose."""
        cores = len(allowed) or os.cpu_count() or 1
        return cores if self.cpus is None or self.cpus >= cores else max(1, int(self.cpus))


def container_limits(read: Read = _read) -> Limits:
    """The tightest limits of the control groups (versions 1 and 2) of this process, and of those around them.
    Without control groups (macOS) there are none."""
    cpus: list[float] = []
    memory: list[int] = []
    for controllers, group in _memberships(read(_MEMBERSHIP) or ""):
        if not controllers:  # version 2 has one hierarchy, of no name
            for folder in _and_parents(_ROOT, group):
                cpus += _quota(read(folder / "cpu.max"))
                memory += _number(read(folder / "memory.max"))
        if "cpu" in controllers:
            for folder in _and_parents(_ROOT / "cpu", group):
                quota, period = read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")
                cpus += _quota(f"{quota} {period}")
        if "memory" in controllers:
            for folder in _and_parents(_ROOT / "memory", group):
                memory += _number(read(folder / "memory.limit_in_bytes"))
    return Limits(min(cpus, default=None), min(memory, default=None))


def _memberships(text: str) -> Iterator[tuple[list[str], PurePosixPath]]:
    """Controllers (none for version 2) and group of each line `number:controllers:group`."""
    for line in text.splitlines():
        _, controllers, group = line.split(":", 2)
        yield controllers.split(",") if controllers else [], PurePosixPath(group)


def _and_parents(mount: PurePosixPath, group: PurePosixPath) -> Iterable[PurePosixPath]:
    """The group's folder and those of the groups around it. Inside a container the group may have the name
    that it has outside, where nothing is found here, and the mount itself be the group."""
    inside = PurePosixPath(*group.parts[1:])
    return [mount / part for part in (inside, *inside.parents)]


def _quota(text: str | None) -> list[float]:
    """CPUs from `quota period` (µs); version 2 writes `max`, version 1 `-1` for no limit."""
    numbers = (text or "").split()
    if len(numbers) != 2 or not all(n.isdecimal() for n in numbers) or int(numbers[1]) == 0:
        return []
    return [int(numbers[0]) / int(numbers[1])]


def _number(text: str | None) -> list[int]:
    """Bytes, where there is a limit."""
    digits = (text or "").strip()
    return [int(digits)] if digits.isdecimal() and int(digits) < _NO_LIMIT_BYTES else []
