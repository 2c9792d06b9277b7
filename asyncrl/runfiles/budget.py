"""The GPU hours that a run has spent and may spend: GPUs held, busy or not, times wall-clock time."""

from __future__ import annotations

import asyncio
import json
import logging
import statistics
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from asyncrl.paths import replace_file

log = logging.getLogger(__name__)

PACE_STEPS = 20
"""Future steps are expected to take the median time of this many last ones."""
METER_S = 5.0
"""The usage of a killed run is known to within this many seconds."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a run uses, written to its directory at the start and every few seconds."""

    gpus: int
    started_at: float
    """Seconds since the epoch, like all times here."""
    earlier_gpu_hours: float = 0.0
    """Spent before the run was resumed."""
    seen_at: float = 0.0
    """Last time at which it was certainly running. (A resumed run removes metrics after its checkpoint.)"""

    def gpu_hours(self, at: float) -> float:
        """Spent by the time `at`."""
        return self.earlier_gpu_hours + self.gpus * max(0.0, at - self.started_at) / 3600

    def resumed(self, gpus: int, at: float) -> Self:
        """The usage of the same run when it is resumed."""
        return replace(
            self, gpus=gpus, started_at=at, earlier_gpu_hours=self.gpu_hours(self.seen_at), seen_at=at
        )

    def save(self, path: Path) -> None:
        replace_file(path, json.dumps(asdict(self)).encode() + b"\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text()))


@asynccontextmanager
async def metered(path: Path, now: Callable[[], float] = time.time) -> AsyncIterator[None]:
    """While the body runs, keep `seen_at` of the usage in `path` at most `METER_S` old."""
    usage = Usage.load(path)

    async def keep() -> None:
        while True:
            await asyncio.sleep(METER_S)
            see()

    def see() -> None:
        try:
            replace(usage, seen_at=now()).save(path)
        except OSError as error:  # whoever cannot continue on a full disk will report it
            log.warning("cannot write %s: %s", path, error)

    keeper = asyncio.create_task(keep(), name="meter of GPU hours")
    try:
        yield
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        see()


class Budget:
    """Meters a run step by step.

    gpu_hours: the limit; None for no limit. now: returns seconds since the epoch.
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
        return self._usage.gpu_hours(self._now())

    def stepped(self, step_s: float) -> None:
        """A training step took `step_s` seconds, including all waits."""
        self._steps_s.append(step_s)

    def total_steps(self, done: int) -> int:
        """The total number of steps: all, or as many as the rest of the budget pays for at the current pace,
        but at least the current one."""
        if self._gpu_hours is None or not self._steps_s or not self._usage.gpus:
            return self._total_steps
        left_s = (self._gpu_hours - self.spent_gpu_hours) * 3600 / self._usage.gpus
        return max(done + 1, min(self._total_steps, done + int(left_s / max(self._pace_s, 1e-9) + 1e-6)))

    @property
    def is_spent(self) -> bool:
        """Whether another step would exceed the budget."""
        if self._gpu_hours is None:
            return False
        return self.spent_gpu_hours + self._usage.gpus * self._pace_s / 3600 > self._gpu_hours

    @property
    def why_spent(self) -> str | None:
        """In words, where it `is_spent`."""
        spent, limit = f"{self.spent_gpu_hours:.2f} GPU hours are spent", f"run.gpu_hours={self._gpu_hours}"
        return f"{spent} and another step would exceed {limit}" if self.is_spent else None

    def metrics(self, done: int) -> Iterator[tuple[str, float]]:
        """`budget/gpu_hours` spent, the expected remaining seconds, and the expected GPU hours of the run."""
        left_s = (self.total_steps(done) - done) * self._pace_s if done < self._total_steps else 0.0
        yield "budget/gpu_hours", self.spent_gpu_hours
        yield "budget/eta_s", left_s
        yield "budget/expected_gpu_hours", self.spent_gpu_hours + self._usage.gpus * left_s / 3600

    @property
    def _pace_s(self) -> float:
        return statistics.median(self._steps_s) if self._steps_s else 0.0
