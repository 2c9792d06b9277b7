"""What this process is waiting for, and since when, in words for people. The waiting code reports it, and the
role's pulse (`asyncrl.liveness.pulse`) passes it on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import msgspec

from asyncrl.states import State, doing
from asyncrl.trace import ended


class Wait(msgspec.Struct, frozen=True):
    what: str
    """Completes the sentence `it waits for ...`."""
    since_s: float
    """By the wall clock, which all processes share."""
    until_s: float | None = None
    """When it ends at the latest, for a wait for something unavailable: until then, the run waits, too."""


_open: dict[int, Wait] = {}
_numbers = itertools.count()


@contextmanager
def waiting(what: str, patience_s: float | None = None, *, state: State | None = None) -> Iterator[None]:
    """While the body runs, this process waits for `what`. Any thread or task may call this; waits may
    overlap.

    patience_s: the longest wait, for something that is unavailable and may come back. state: that this
    process is in meanwhile.
    """
    number, now_s = next(_numbers), time.time()
    _open[number] = Wait(what, now_s, None if patience_s is None else now_s + patience_s)
    try:
        with nullcontext() if state is None else doing(state):
            yield
    finally:
        del _open[number]
        ended("wait", what, time.time() - now_s)


def open_waits() -> list[Wait]:
    """The waits that have not ended, oldest first."""
    return list(_open.values())


class Stopwatch:
    """Runs while there is anything to wait for; what overlaps counts once."""

    def __init__(self) -> None:
        self._open = 0
        self._since_s = self._before_s = 0.0

    @property
    def total_s(self) -> float:
        return self._before_s + (time.monotonic() - self._since_s if self._open else 0.0)

    def begin(self) -> None:
        if not self._open:
            self._since_s = time.monotonic()
        self._open += 1

    def end(self) -> None:
        total_s = self.total_s
        self._open -= 1
        if not self._open:
            self._before_s = total_s
