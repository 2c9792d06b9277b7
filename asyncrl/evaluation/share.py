"""The share of the time in which an engine may generate beside a training (`evaluation.share`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from asyncrl.waits import waiting

BURST_S = 5.0
"""An engine that has rested may generate for so long before it rests again: slots that are filled together
cost less than one after the other."""
POLL_S = 0.25
"""How soon the end of the training is noticed."""


class Share:
    """Has an engine take no further requests while it has generated for more than its share of the time. What
    it has begun it finishes, and rests for the longer.

    busy_s: how long the engine has generated, in all. is_over: whether nothing trains any more, so that all
    of the time is the engine's. Made in the event loop whose clock it goes by.
    """

    def __init__(self, share: float, busy_s: Callable[[], float], is_over: Callable[[], bool]) -> None:
        self._share = share
        self._busy_s = busy_s
        self._is_over = is_over
        self._now_s = asyncio.get_running_loop().time
        self._seen = self._now_s(), busy_s()
        self._left_s = BURST_S
        """For which it may generate; below 0 what it has taken too much."""

    async def turn(self) -> None:
        """Wait until it may take requests."""
        if self._share < 1 and self._left() <= 0:
            with waiting("its share of the time (evaluation.share)", state="wait_work"):
                while not self._is_over() and self._left() < BURST_S:
                    await asyncio.sleep(POLL_S)

    def _left(self) -> float:
        (then_s, busy_then_s), self._seen = self._seen, (self._now_s(), self._busy_s())
        now_s, busy_now_s = self._seen
        earned_s = self._share * (now_s - then_s)
        self._left_s = min(BURST_S, self._left_s + earned_s - (busy_now_s - busy_then_s))
        return self._left_s
