"""Groups that a worker asks for before it has room for them: on another host, the answer comes late."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_GROUPS = 32
"""Whose pace counts: the last ones."""


class Ahead:
    """round_trip_s: that a request takes which is answered at once. now_s: the clock."""

    def __init__(
        self, round_trip_s: Callable[[], float], now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._round_trip_s = round_trip_s
        self._now_s = now_s
        self._done_s: deque[float] = deque(maxlen=_GROUPS)

    def did_one(self) -> None:
        """A group."""
        self._done_s.append(self._now_s())

    def groups(self) -> int:
        """As many as are done within two round trips: a place that falls free waits for the answer that is on
        its way, and then for its own. On one host, none."""
        if len(self._done_s) < 2:
            return 0
        pace_per_s = (len(self._done_s) - 1) / max(self._now_s() - self._done_s[0], 1e-9)
        return round(2 * self._round_trip_s() * pace_per_s)
