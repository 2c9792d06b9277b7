"""An asyncio event loop on virtual time: it never waits, and jumps to the next timer when nothing else is
left."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0. Only timers move it; a wake-up can be made late with `lateness_s`."""

    def __init__(self, lateness_s: float = 0.0) -> None:
        self.now_s = 0.0
        self.wakeups = 0
        super().__init__(_JumpingSelector(self, lateness_s))

    def time(self) -> float:
        return self.now_s

    def run_in_executor(self, executor, func, *args) -> asyncio.Future:
        """At once and in this thread: virtual time must not pass while a thread works."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  # handed to whoever awaits the future
            future.set_exception(error)
        return future


class _JumpingSelector(selectors.SelectSelector):
    """The loop asks its selector to wait for as long as its next timer is away: instead of waiting, time
    passes."""

    def __init__(self, loop: VirtualClockLoop, lateness_s: float) -> None:
        super().__init__()
        self._loop = loop
        self._lateness_s = lateness_s

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:  # no timer: something from another thread must come
            ready = super().select(60.0)
            assert ready, "nothing can happen any more: a wait without an end"
            return ready
        if timeout > 0:
            self._loop.wakeups += 1
            self._loop.now_s += timeout + self._lateness_s
        return super().select(0)


def run_virtual(main: Coroutine[Any, Any, T], lateness_s: float = 0.0) -> tuple[T, VirtualClockLoop]:
    """Run a coroutine to its end on a fresh virtual clock. Returns its result and the loop."""
    loop = VirtualClockLoop(lateness_s)
    try:
        return loop.run_until_complete(main), loop
    finally:
        loop.close()
