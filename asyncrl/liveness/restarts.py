"""How often, and how soon, a role that died is restarted."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from asyncrl.config import Config

WINDOW_S = 3600.0
"""Older restarts do not count: a role that dies once a day is not broken."""
FIRST_DELAY_S = 1.0
MAX_DELAY_S = 30.0
COORDINATOR_START_S = 60.0
"""Time for a new coordinator to start and to read the ledger."""


def answer_timeout_s(config: Config) -> float:
    """Longest wait for an answer that the coordinator gives at once: longer than it takes to find out that it
    hangs and to start another one in its place."""
    return config.run.hang_s + MAX_DELAY_S + COORDINATOR_START_S


@dataclass(slots=True)
class Restarts:
    """The restarts of one role: at most `max_restarts` within any `WINDOW_S`."""

    max_restarts: int
    _at_s: deque[float] = field(default_factory=deque)

    def recent(self, now_s: float) -> int:
        """Restarts that still count."""
        while self._at_s and now_s - self._at_s[0] >= WINDOW_S:
            self._at_s.popleft()
        return len(self._at_s)

    def after_death(self, now_s: float) -> float | None:
        """Seconds to wait before restarting the role, which died at `now_s`; None if it has died too often.
        The first restart is immediate, then the delay doubles: a temporary cause (memory, a port, a driver)
        gets time to pass, and a permanent one does not keep the machine busy."""
        before = self.recent(now_s)
        if before >= self.max_restarts:
            return None
        delay_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** (before - 1)) if before else 0.0
        self._at_s.append(now_s + delay_s)
        return delay_s
