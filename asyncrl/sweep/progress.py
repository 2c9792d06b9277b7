"""Reports the progress of a sweep in plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable

from asyncrl.sweep.grid import Cell
from asyncrl.units import duration


class SweepProgress:
    """Prints a line when a cell starts and when it ends, and remembers which cells failed.

    total: cells of the sweep, as far as known. finished: cells that earlier calls have finished. jobs: cells
    that run at the same time. tell: prints a line. now_s: a monotonic clock.
    """

    def __init__(
        self,
        total: int,
        finished: int,
        jobs: int,
        tell: Callable[[str], None] = lambda line: print(line, flush=True),
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.failed: dict[Cell, str] = {}
        self.total = total
        self._done = finished
        self._jobs = jobs
        self._tell = tell
        self._now_s = now_s
        self._started_s: dict[Cell, float] = {}
        self._durations_s: list[float] = []
        before = f", {finished} of them finished before" if finished else ""
        tell(f"{total} cells{before}")

    def started(self, cell: Cell) -> None:
        self._started_s[cell] = self._now_s()
        self._tell(f"{cell.name}: started")

    def ended(self, cell: Cell, problem: str | None) -> None:
        took_s = self._now_s() - self._started_s.pop(cell)
        self._durations_s.append(took_s)
        self._done += 1
        if problem is None:
            how = f"finished in {duration(took_s)}"
        else:
            self.failed[cell] = problem
            how = f"FAILED after {duration(took_s)}"
        left = self.total - self._done
        mean_s = sum(self._durations_s) / len(self._durations_s)
        rest = f", about {duration(mean_s * left / min(self._jobs, left))} left" if left else ""
        self._tell(f"{cell.name}: {how} ({self._done} of {self.total}{rest})")
        if problem is not None:
            self._tell(problem)
