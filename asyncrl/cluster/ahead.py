"""Groups that a worker asks for before it has room for them: on another host, the answer comes late."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_FADES_S = 1.0
"""After so long a group counts for 1/e of its pace."""
_LEAST_S = 0.1
"""What is done in less says nothing of a pace."""


class Ahead:
    """round_trip_s: that a request takes which is answered at once. now_s: the clock."""

    def __init__(
        self, round_trip_s: Callable[[], float], now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._round_trip_s = round_trip_s
        self._now_s = now_s
        self._done = 0.0
        """Groups, faded, at the end of the last one."""
        self._last_s = now_s()
        self._began_s = math.inf

    def did_one(self) -> None:
        """A group."""
        self._done, self._last_s = self._faded() + 1, self._now_s()

    def groups(self) -> int:
        """As many as are done within four round trips: a place that falls free waits for the answer that is
        on its way, and then for its own; twice as many, since it is with a version that groups may be given,
        all at once. On one host, none. (The pace is that of a second: groups that end in the same moment, as
        they do at their longest length, are no sign of more to come.)"""
        if math.isinf(round_trip_s := self._round_trip_s()):
            return 0
        now_s = self._now_s()
        self._began_s = min(self._began_s, now_s)
        counted_s = _FADES_S * -math.expm1((self._began_s - now_s) / _FADES_S)  # less at first
        return round(4 * round_trip_s * self._faded() / max(counted_s, _LEAST_S))

    def _faded(self) -> float:
        return self._done * math.exp((self._last_s - self._now_s()) / _FADES_S)
