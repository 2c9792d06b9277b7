"""Progress of this process's long-running work. The computing code reports it, and the role's pulse
(`asyncrl.liveness.pulse`) passes it on, so that others can tell slow from stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec


class Work(msgspec.Struct, frozen=True):
    what: str
    """What the pieces are, such as `micro-batches of the policy's updates`."""
    done: int
    """Pieces done so far."""
    total: int | None
    """None if it is not known."""
    at_s: float
    """Wall-clock time of the last finished piece, or of the start."""

    def after_one(self) -> Work:
        """With one more piece done, now."""
        return Work(self.what, self.done + 1, self.total, time.time())


_current: Work | None = None


@contextmanager
def working(what: str, total: int | None = None) -> Iterator[None]:
    """While the body runs, this process does `total` pieces of work and calls `did_one` after each. Within
    other work it goes before that, which goes on afterwards. For one thread at a time."""
    global _current
    outer = _current
    _current = Work(what, 0, total, time.time())
    try:
        yield
    finally:
        _current = outer and msgspec.structs.replace(outer, at_s=time.time())


def did_one() -> None:
    """A piece of the current work is done. Without any, this does nothing."""
    global _current
    if _current is not None:
        _current = _current.after_one()


def current_work() -> Work | None:
    """The current work, if any."""
    return _current


_steps: dict[int, float] = {}
"""When each thread that is in a step began it, by the monotonic clock."""


@contextmanager
def stepping() -> Iterator[None]:
    """While the body runs, this thread takes a step that the event loop could take itself and that should
    soon be over. While one is not, the pulse stops, as it would if the event loop hung in it."""
    _steps[threading.get_ident()] = time.monotonic()
    try:
        yield
    finally:
        del _steps[threading.get_ident()]


def longest_step_s() -> float:
    """How long the threads that are in a step have been in it, at most; 0 if none is."""
    return max((time.monotonic() - began_s for began_s in list(_steps.values())), default=0.0)


_unhurried: list[str] = []
_listener: Callable[[], None] | None = None


def tell(listener: Callable[[], None]) -> None:
    """From now on, call `listener` whenever something `unhurried` starts or ends, in that thread."""
    global _listener
    _listener = listener


@contextmanager
def unhurried(what: str) -> Iterator[None]:
    """While the body runs, this process does something long whose progress cannot be measured, such as
    writing files: it counts as progress all the time. For any thread."""
    _unhurried.append(what)
    _changed()
    try:
        yield
    finally:
        _unhurried.remove(what)
        _changed()


def _changed() -> None:
    if _listener is not None:
        _listener()


def current_unhurried() -> str | None:
    """The latest `unhurried` work in progress, if any."""
    return _unhurried[-1] if _unhurried else None
