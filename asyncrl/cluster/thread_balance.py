"""With how many threads a training step computes where it shares the cores with the engines: tried, and kept
if the run is faster by it."""

from __future__ import annotations

import statistics
from collections import deque

MEASURED = 5
"""Steps whose median is what a number of threads takes."""
IDLE = 0.35
"""Share of their time for which engines must have had nothing to do for the trainer to try their cores. A run
of two halves with a core each can gain half of it, less some 15% that a second thread costs."""
GAIN = 0.05
"""Of a step's time: less is no reason to change."""
FIRST_REST, REST, LONGEST_REST = 20, 160, 640
"""Steps before the first try, and after one that was a gain. Every one that fails doubles them."""


class ThreadBalance:
    """Chooses between two numbers of threads by the steps that were done.

    A try costs a few steps, and its outcome alone decides: whatever threads cost each other, the caches and
    other programs, is in the time of a step. The trainer gives cores back by the same kind of try, whoever
    is idle, for by then idle engines no longer tell what one thread would take.

    own: threads of the trainer at first. most: with the engines' cores. settle: steps after a change that
        tell nothing yet: as many batches can have been sampled before it.
    """

    def __init__(self, own: int, most: int, settle: int) -> None:
        if not (1 <= own < most and settle >= 0):
            raise ValueError(f"own={own}, most={most}, settle={settle}; needed: 1 <= own < most, settle >= 0")
        self.threads = own
        self._own, self._most, self._settle = own, most, settle
        self._since = 0
        """Steps since the number was last changed, or a try was over."""
        self._rest = FIRST_REST
        self._last: deque[tuple[float, float]] = deque(maxlen=MEASURED)
        """Seconds, and how idle the engines were, of those that tell something."""
        self._to_beat_s: float | None = None
        """A step's time before the try; None where none is under way."""

    def stepped(self, step_s: float, engines_idle: float) -> int:
        """The threads for the next step.

        step_s: from the end of the step before to the end of this one. engines_idle: share of it in which the
        engines had nothing to decode.
        """
        self._since += 1
        if self._since > self._settle:
            self._last.append((step_s, engines_idle))
        if len(self._last) == MEASURED:
            median_s = statistics.median(s for s, _ in self._last)
            if self._to_beat_s is not None:
                self._judge(median_s)
            elif self._since >= self._rest and self._may_gain():
                self._to_beat_s = median_s
                self._change()
        return self.threads

    def _may_gain(self) -> bool:
        return self.threads == self._most or statistics.fmean(idle for _, idle in self._last) > IDLE

    def _judge(self, median_s: float) -> None:
        assert self._to_beat_s is not None
        if median_s <= (1 - GAIN) * self._to_beat_s:
            self._rest, self._since = REST, 0
        else:
            self._rest = min(2 * self._rest, LONGEST_REST)
            self._change()
        self._to_beat_s = None

    def _change(self) -> None:
        self.threads = self._own if self.threads == self._most else self._most
        self._since = 0
        self._last.clear()
