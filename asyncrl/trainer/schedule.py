"""Learning rates by training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2,
}
"""What is left of the way from the peak to the minimum, at `progress` 0..1 after the warm-up."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate of each training step (0 is the first).

    Rises linearly to `peak`, reached at step `warmup_steps`, the first step at `peak / (warmup_steps + 1)`;
    then constant, or falling to `min_share * peak`, reached at step `total_steps - 1` and kept after it.
    frozen_steps: so many first ones have a learning rate of 0.
    """

    peak: float
    shape: str
    warmup_steps: int
    total_steps: int
    min_share: float
    frozen_steps: int = 0

    def __call__(self, step: int, total_steps: int | None = None) -> float:
        """total_steps: how many are expected by now."""
        if step < self.frozen_steps:
            return 0.0
        if step < self.warmup_steps:
            return self.peak * (step + 1) / (self.warmup_steps + 1)
        falling_steps = max(1, (total_steps or self.total_steps) - 1 - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / falling_steps)
        left = SHAPES[self.shape](progress)
        return self.peak * (left + (1.0 - left) * self.min_share)
