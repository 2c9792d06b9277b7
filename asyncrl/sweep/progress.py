"""Reports the progress of a sweep in plain lines."""

from __future__ import annotations

import time

from asyncrl.sweep.grid import Cell
from asyncrl.units import duration


class SweepProgress:
    """Prints a line when a cell starts and when it ends, and remembers which cells failed.

    total: cells of the sweep, as far as known. finished: cells that earlier calls have finished. jobs: cells
    that run at the same time.
    """

    def __init__(self, total: int, finished: int, jobs: int) -> None:
        self.failed: dict[Cell, str] = {}
        self.total = total
        self._done = finished
        self._jobs = jobs
        self._started_s: dict[Cell, float] = {}
        self._durations_s: list[float] = []
        before = f", {finished} of them finished before" if finished else ""
        _tell(f"{total} cells{before}")

    def started(self, cell: Cell) -> None:
        self._started_s[cell] = time.monotonic()
        _tell(f"{cell.name}: started")

    def ended(self, cell: Cell, problem: str | None) -> None:
        took_s = time.monotonic() - self._started_s.pop(cell)
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
        _tell(f"{cell.name}: {how} ({self._done} of {self.total}{rest})")
        if problem is not None:
            _tell(problem)


def _tell(line: str) -> None:
    print(line, flush=True)
