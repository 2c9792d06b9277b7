"""The GPU hours that a run has spent and may spend: GPUs held, whatever they do, times wall-clock time."""

from __future__ import annotations

import json
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

PACE_STEPS = 20
"""The pace that is expected of the steps to come is the median of so many last ones."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run holds, written into its directory when it starts."""

    gpus: int
    started_at: float
    """Seconds since the epoch."""
    earlier_gpu_hours: float = 0.0
    """Spent before it was resumed."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text()))


class Budget:
    """Meters a run step by step.

    gpu_hours: how many the run may spend; None for any number. now: seconds since the epoch.
    """

    def __init__(
        self, usage: Usage, gpu_hours: float | None, total_steps: int, now: Callable[[], float] = time.time
    ) -> None:
        self._usage = usage
        self._gpu_hours = gpu_hours
        self._total_steps = total_steps
        self._now = now
        self._steps_s: deque[float] = deque(maxlen=PACE_STEPS)

    @property
    def spent_gpu_hours(self) -> float:
        u = self._usage
        return u.earlier_gpu_hours + u.gpus * max(0.0, self._now() - u.started_at) / 3600

    def stepped(self, step_s: float) -> None:
        """A training step took `step_s` seconds, all waits included."""
        self._steps_s.append(step_s)

    def total_steps(self, done: int) -> int:
        """Steps that the run will have had in the end: all, or as many as the rest of the budget pays for at
        the present pace. At least the one that is under way."""
        if self._gpu_hours is None or not self._steps_s or not self._usage.gpus:
            return self._total_steps
        left_s = (self._gpu_hours - self.spent_gpu_hours) * 3600 / self._usage.gpus
        return max(done + 1, min(self._total_steps, done + int(left_s / max(self._pace_s, 1e-9) + 1e-6)))

    @property
    def is_spent(self) -> bool:
        """Whether another step would overspend the budget."""
        if self._gpu_hours is None:
            return False
        return self.spent_gpu_hours + self._usage.gpus * self._pace_s / 3600 > self._gpu_hours

    def metrics(self, done: int) -> Iterator[tuple[str, float]]:
        """`budget/gpu_hours` spent, and what is expected: seconds left, and the GPU hours of the whole
        run."""
        left_s = (self.total_steps(done) - done) * self._pace_s if done < self._total_steps else 0.0
        yield "budget/gpu_hours", self.spent_gpu_hours
        yield "budget/eta_s", left_s
        yield "budget/expected_gpu_hours", self.spent_gpu_hours + self._usage.gpus * left_s / 3600

    @property
    def _pace_s(self) -> float:
        return statistics.median(self._steps_s) if self._steps_s else 0.0
