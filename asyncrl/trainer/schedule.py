"""Learning rates by training step."""

from __future__ import annotations

import math
from collections.abc import Callable

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: (1.0 + math.cos(math.pi * progress)) / 2,
}
"""What is left of the way from the peak to the minimum, at `progress` 0..1 after the warm-up."""


def learning_rate(
    step: int, *, peak: float, schedule: str, warmup_steps: int, total_steps: int, min_share: float
) -> float:
    """The learning rate of training step `step` (0 is the first).

    Rises linearly to `peak`, reached at step `warmup_steps`, the first step at `peak / (warmup_steps + 1)`;
    then constant, or falling to `min_share * peak`, reached at step `total_steps - 1` and kept after it.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    falling_steps = max(1, total_steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / falling_steps)
    left = SHAPES[schedule](progress)
    return peak * (left + (1.0 - left) * min_share)
