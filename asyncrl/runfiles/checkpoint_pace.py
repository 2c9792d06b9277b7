"""How often a run writes checkpoints if its settings leave that open. Pure."""

from __future__ import annotations

import math

FIRST_S = 60.0
"""Shortest time between two checkpoints, and from the start of the training to the first."""
MEAN_S_BETWEEN_INTERRUPTIONS = 86400.0
"""Assumed mean time between events that interrupt a run."""
WRITING_SHARE = 0.25
"""Largest share of the time in which the disk is written to."""


def interval_s(pause_s: float, writing_s: float) -> float:
    """Seconds from one checkpoint to the next.

    The square root of 2 * pause_s * `MEAN_S_BETWEEN_INTERRUPTIONS` minimises the time lost to checkpoints and
    interruptions together (Young 1974, "A first order approximation to the optimum checkpoint interval").

    pause_s: time that a checkpoint keeps the training waiting. writing_s: time until it is on the disk, while
    the training goes on.
    """
    optimum_s = math.sqrt(2 * pause_s * MEAN_S_BETWEEN_INTERRUPTIONS)
    return max(FIRST_S, optimum_s, writing_s / WRITING_SHARE)
