"""How often a run makes checkpoints where its settings leave that open. Pure."""

from __future__ import annotations

import math

FIRST_S = 60.0
"""No two checkpoints are nearer than this, nor is the first one to the start of the training."""
MEAN_S_BETWEEN_INTERRUPTIONS = 86400.0
"""How often something ends a run before its time: an assumption."""
WRITING_SHARE = 0.25
"""The disk is not written to for more than this share of the time."""


def interval_s(pause_s: float, writing_s: float) -> float:
    """Seconds from one checkpoint to the next.

    The square root of 2 * pause_s * `MEAN_S_BETWEEN_INTERRUPTIONS` loses least, to checkpoints and to
    interruptions together (Young 1974, "A first order approximation to the optimum checkpoint interval").

    pause_s: for which a checkpoint keeps the training waiting. writing_s: until it is on the disk, beside the
    training.
    """
    optimum_s = math.sqrt(2 * pause_s * MEAN_S_BETWEEN_INTERRUPTIONS)
    return max(FIRST_S, optimum_s, writing_s / WRITING_SHARE)
