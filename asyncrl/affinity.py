"""Keeps a process on cores of its own, and what it starts off them again."""

from __future__ import annotations

import os
from collections.abc import Iterable

OWN_CORES = "ASYNCRL_OWN_CORES"
"""Environment variable that names the cores a role is to stay on, as `0,1`."""
_ALL_CORES = "ASYNCRL_ALL_CORES"
"""The same of those that it could have used."""


def listed(cores: Iterable[int]) -> str:
    return ",".join(map(str, sorted(cores)))


def pin() -> None:
    """Stay on the cores that the environment names, if it names any. Threads and processes started from now
    on stay there as well."""
    if own := os.environ.pop(OWN_CORES, None):
        os.environ[_ALL_CORES] = listed(os.sched_getaffinity(0))
        os.sched_setaffinity(0, _cores(own))


def unpin() -> None:
    """Use all cores again, in a process that a pinned one has started and that computes nothing of its
    work."""
    if cores := os.environ.pop(_ALL_CORES, None):
        os.sched_setaffinity(0, _cores(cores))


def _cores(text: str) -> set[int]:
    return {int(core) for core in text.split(",")}
