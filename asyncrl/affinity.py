"""Pins a process to its own cores, and unpins the processes that it starts; and sets torch's threads."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from asyncrl.container import container_limits

OWN_CORES = "ASYNCRL_OWN_CORES"
"""Environment variable that names the cores a role is pinned to, as `0,1`."""
_ALL_CORES = "ASYNCRL_ALL_CORES"
"""The same for the cores that it could use before."""


def listed(cores: Iterable[int]) -> str:
    return ",".join(map(str, sorted(cores)))


def pin() -> None:
    """Use only the cores that the environment names, if any. Threads and processes started from now on
    inherit this."""
    if own := os.environ.pop(OWN_CORES, None):
        os.environ[_ALL_CORES] = listed(os.sched_getaffinity(0))
        os.sched_setaffinity(0, _cores(own))


def unpin() -> None:
    """Use all cores again, in a process that was started by a pinned one but does none of its computing."""
    if cores := os.environ.pop(_ALL_CORES, None):
        os.sched_setaffinity(0, _cores(cores))


def usable_cores() -> int:
    """Cores that the processes which this one starts can keep busy, whatever it is pinned to itself."""
    if sys.platform != "linux":
        return container_limits().cores()
    pinned_from = os.environ.get(_ALL_CORES)
    return container_limits().cores(_cores(pinned_from) if pinned_from else os.sched_getaffinity(0))


def own_cores() -> int:
    """Cores that this process itself can keep busy."""
    return container_limits().cores(os.sched_getaffinity(0) if sys.platform == "linux" else ())


@contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """What torch computes on the CPU meanwhile, it computes with `n` threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def use_torch_threads() -> None:
    """First in a new thread that computes: in a forked process it would compute alone until it has asked
    torch how many threads compute with it."""
    import torch

    torch.get_num_threads()


def _cores(text: str) -> set[int]:
    return {int(core) for core in text.split(",")}
