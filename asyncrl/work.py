"""How far this process is with work that takes long. Whoever computes says so, and the role's pulse
(`asyncrl.liveness.pulse`) passes it on: so others tell what takes long from what has stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec


class Work(msgspec.Struct, frozen=True):
    what: str
    """The pieces that it is done by, such as `micro-batches of the policy's updates`."""
    done: int
    """Pieces done so far."""
    total: int | None
    """None where nobody knows how many there will be."""
    at_s: float
    """When the last piece was done, or the work begun, by the wall clock."""

    def after_one(self) -> Work:
        """One piece more is done now."""
        return Work(self.what, self.done + 1, self.total, time.time())


_current: Work | None = None


@contextmanager
def working(what: str, total: int | None = None) -> Iterator[None]:
    """For the body, this process does `total` pieces of work, and says `did_one` after each. One thread at a
    time may."""
    global _current
    _current = Work(what, 0, total, time.time())
    try:
        yield
    finally:
        _current = None


def did_one() -> None:
    """A piece of the work under way is done. Without any, nobody counts."""
    global _current
    if _current is not None:
        _current = _current.after_one()


def current_work() -> Work | None:
    """The work under way, if there is any."""
    return _current


_unhurried: list[str] = []
_listener: Callable[[], None] | None = None


def tell(listener: Callable[[], None]) -> None:
    """From now on, `listener` is called whenever something `unhurried` begins or ends, in its thread."""
    global _listener
    _listener = listener


@contextmanager
def unhurried(what: str) -> Iterator[None]:
    """For the body, this process does something long of which nobody can say how far it is, such as writing
    files: that it is under way counts as progress. Any thread may."""
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
    """What of that is under way, the latest; None where nothing is."""
    return _unhurried[-1] if _unhurried else None
