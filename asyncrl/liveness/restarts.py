"""How often, and how soon, a role that died is started again."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 3600.0
"""A restart that is longer ago than this is forgiven: what dies once a day is no broken role."""
FIRST_DELAY_S = 1.0
MAX_DELAY_S = 30.0
COORDINATOR_START_S = 60.0
"""For another coordinator to start and to read the ledger."""


@dataclass(slots=True)
class Restarts:
    """Of one role: at most `max_restarts` within any `WINDOW_S`."""

    max_restarts: int
    _at_s: deque[float] = field(default_factory=deque)

    def recent(self, now_s: float) -> int:
        """Restarts that are not forgiven yet."""
        while self._at_s and now_s - self._at_s[0] >= WINDOW_S:
            self._at_s.popleft()
        return len(self._at_s)

    def after_death(self, now_s: float) -> float | None:
        """Seconds to wait before the role, which died at `now_s`, is started again; None when it has died too
        often. At once after a first death, then with delays that double: a cause that passes (memory, a port,
        a driver) gets time to, and one that stays does not keep the machine busy."""
        before = self.recent(now_s)
        if before >= self.max_restarts:
            return None
        delay_s = min(MAX_DELAY_S, FIRST_DELAY_S * 2 ** (before - 1)) if before else 0.0
        self._at_s.append(now_s + delay_s)
        return delay_s
