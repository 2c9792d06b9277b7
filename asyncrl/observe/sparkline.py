"""Draws a series of numbers as one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int, low: float, high: float) -> str:
    """At most `width` characters, oldest value first, from `low` (lowest level) to `high` (highest).

    If there are more values than characters, equal stretches are averaged. NaN leaves a blank; values outside
    the range are clipped.
    """
    if len(values) > width:
        edges = [i * len(values) // width for i in range(width + 1)]
        values = [_mean(values[a:b]) for a, b in pairwise(edges)]
    span = high - low
    return "".join(_level((value - low) / (span or 1.0)) for value in values)


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN if there are none."""
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _level(share: float) -> str:
    if math.isnan(share):
        return " "
    return LEVELS[round(min(max(share, 0.0), 1.0) * (len(LEVELS) - 1))]
