"""What the machine has, and what a container leaves of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import psutil

from asyncrl.weights.shm.segment import shared_folder

PLANNED_GPU_BYTES = 80 * 10**9
"""Memory of a GPU that is only planned for."""

_ROOT = PurePosixPath("/sys/fs/cgroup")
_MEMBERSHIP = PurePosixPath("/proc/self/cgroup")
_NO_LIMIT_BYTES = 1 << 60
"""Version 1 writes "no limit" as the largest number of whole pages."""

Read = Callable[[PurePosixPath], str | None]
"""The text of a file, None where it cannot be read."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use of the machine."""

    cores: int
    memory_bytes: int
    gpu_bytes: tuple[int, ...]
    """Memory of each GPU that CUDA can use."""
    shared_memory_bytes: int | None
    """Free shared memory; None where it is not limited apart from the memory (macOS)."""
    own_cores: tuple[int, ...] = ()
    """Numbers of the cores that are this process's alone to give away; none where the system lets nobody
    choose (macOS), and where a container limits CPU time: what others may compute on the same cores."""

    @property
    def gpus(self) -> int:
        return len(self.gpu_bytes)

    def with_planned_gpus(self, gpus: int) -> Machine:
        """This machine as if it had so many GPUs of 80 GB, and cores of which nothing is known but their
        number."""
        return replace(self, gpu_bytes=(PLANNED_GPU_BYTES,) * gpus, own_cores=())


def probe() -> Machine:
    """Look at this machine, and at what its container leaves of it."""
    import torch

    on_linux = sys.platform == "linux"
    allowed = tuple(sorted(os.sched_getaffinity(0))) if on_linux else ()
    cores = len(allowed) or os.cpu_count() or 1
    memory_bytes = psutil.virtual_memory().total
    limits = container_limits(_read)
    quota = limits.cpus if limits.cpus is not None and limits.cpus < cores else None
    return Machine(
        cores=cores if quota is None else max(1, int(quota)),
        memory_bytes=min(memory_bytes, limits.memory_bytes or memory_bytes),
        gpu_bytes=tuple(
            torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())
        ),
        shared_memory_bytes=psutil.disk_usage(str(shared_folder())).free if on_linux else None,
        own_cores=allowed if quota is None else (),
    )


def visible_gpu(index: int) -> str:
    """The name in `CUDA_VISIBLE_DEVICES` of the GPU that is this process's number `index`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a container may use; None where there is no limit."""

    cpus: float | None
    """CPU seconds a second."""
    memory_bytes: int | None


def container_limits(read: Read) -> Limits:
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


def _read(path: PurePosixPath) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None
