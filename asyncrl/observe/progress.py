"""The progress of a run, from its lines of metrics and its supervisor's status. Pure; the live views show
it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from asyncrl.observe.metric_table import scored_set
from asyncrl.observe.role_meter import Times, by_kind, times
from asyncrl.units import number

CHARTED_KEYS = (
    "reward/mean",
    "throughput/generated_tokens_per_s",
    "throughput/trained_tokens_per_s",
    "staleness/mean",
    "idle/trainer",
    "idle/rollout",
)
"""The metrics whose whole history is kept."""
PACE_STEPS = 20
"""The ETA assumes the pace of this many last steps."""
OVERDUE_PACES, OVERDUE_S = 5, 10.0
"""A step is overdue when it has taken this many times the usual time, and at least this many seconds."""


def scores(version: int, metrics: Mapping[str, float]) -> str:
    """The mean reward on each set of prompts, of an evaluated version."""
    told = ", ".join(f"{of} {number(value, 3)}" for key, value in metrics.items() if (of := scored_set(key)))
    return f"{told or 'nothing scored'} (version {version})"


@dataclass(slots=True)
class RunProgress:
    """A run seen from outside. `..._s` are seconds on the watcher's monotonic clock."""

    name: str
    total_steps: int
    max_staleness: int
    started_s: float
    status: str = ""
    """What the run is doing or waiting for."""
    begun_with: int = 0
    """Steps that were done before the watcher started."""
    last: Mapping[str, Any] = field(default_factory=dict)
    """The newest line of metrics; empty before the first."""
    last_line_s: float = math.nan
    """When it was read."""
    scores: str = ""
    """Of the version that was evaluated last."""
    series: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in CHARTED_KEYS})
    _lines: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=PACE_STEPS))
    _recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=PACE_STEPS + 1))
    """Step and wall-clock time of the last lines."""

    def add(self, line: Mapping[str, Any], now_s: float) -> None:
        self.last, self.last_line_s = line, now_s
        self._lines.append(line)
        wall_s = float(line["wall_s"])
        if self._recent and wall_s < self._recent[-1][1]:
            self._recent.clear()  # the trainer has gone on from a checkpoint, whose time counts on
        self._recent.append((int(line["step"]), wall_s))
        for key, values in self.series.items():
            values.append(self.number(key))

    @property
    def steps(self) -> int:
        """Finished training steps."""
        return int(self.last.get("step", 0))

    @property
    def is_done(self) -> bool:
        return self.steps >= self.total_steps

    @property
    def is_under_way(self) -> bool:
        """Whether steps follow each other, so that a status adds nothing."""
        return self.begun_with < self.steps < self.total_steps

    def times(self) -> Times:
        """Where the time of each kind of role went, in the last steps."""
        return by_kind(times(self._lines))

    def number(self, key: str) -> float:
        """A number of the newest line; NaN if it has none of that name."""
        value = self.last.get(key)
        return float(value) if isinstance(value, int | float) else math.nan

    def pace_s(self) -> float | None:
        """Recent seconds per step; None while unknown."""
        if len(self._recent) < 2 or self._recent[-1][0] <= self._recent[0][0]:
            return None
        (first_step, first_s), (last_step, last_s) = self._recent[0], self._recent[-1]
        return (last_s - first_s) / (last_step - first_step)

    def eta_s(self, now_s: float) -> float | None:
        """Seconds until the last step ends; None while unknown."""
        pace_s = self.pace_s()
        if self.is_done or pace_s is None:
            return 0.0 if self.is_done else None
        return max(0.0, (self.total_steps - self.steps) * pace_s - (now_s - self.last_line_s))

    def overdue_s(self, now_s: float) -> float | None:
        """How long the current step has taken, if that is far longer than usual; else None."""
        pace_s = self.pace_s()
        if self.is_done or pace_s is None:
            return None
        quiet_s = now_s - self.last_line_s
        return quiet_s if quiet_s > max(OVERDUE_S, OVERDUE_PACES * pace_s) else None
