"""The statistics of a comparison: means and paired differences with intervals, and Holm's correction.

Intervals and probabilities are Student's, over seeds. With the handful of seeds that one can pay for, a
bootstrap's intervals are too narrow (resampling n values understates their deviation by sqrt((n - 1) / n) and
has none of t's width), and a test by flipping signs cannot get below 2^(1 - n): 0.008 for eight pairs, which
survives no correction for dozens of comparisons. t takes the differences to be about normal.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
EQUAL = 1e-9
"""Relative; what differs by less is rounding."""
_BISECTIONS = 80


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and its two-sided interval of `CONFIDENCE`; NaN bounds and p for fewer than two values, and for
    equal ones that are not 0, of which nobody knows how far they scatter."""

    mean: float
    low: float
    high: float
    p: float
    """Two-sided probability of a mean this far from 0, were the true one 0."""
    n: int


def interval(values: Sequence[float]) -> Interval:
    """Student's interval of the mean. Of pairs' differences it is that of the paired t-test."""
    n = len(values)
    if n < 2:
        return Interval(statistics.fmean(values) if values else math.nan, math.nan, math.nan, math.nan, n)
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(n)
    if mean == error == 0:
        return Interval(mean, mean, mean, 1.0, n)
    if error <= EQUAL * abs(mean):  # a few rewards that are shares can differ by the same by accident
        return Interval(mean, math.nan, math.nan, math.nan, n)
    half = t_quantile(CONFIDENCE, n - 1) * error
    return Interval(mean, mean - half, mean + half, 1 - t_within(abs(mean) / error, n - 1), n)


def t_within(t: float, dof: int) -> float:
    """P(|T| <= t) of Student's distribution with `dof` degrees of freedom (a whole number), t >= 0. Source:
    Abramowitz and Stegun 1964, 26.7.3 and 26.7.4."""
    theta = math.atan2(t, math.sqrt(dof))
    cosine, odd = math.cos(theta), dof % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(1 + odd, dof, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inner = math.sin(theta) * total
    return 2 / math.pi * (theta + inner) if odd else inner


def t_quantile(confidence: float, dof: int) -> float:
    """The t with P(|T| <= t) = confidence, by bisection."""
    low, high = 0.0, 1.0
    while t_within(high, dof) < confidence:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if t_within(middle, dof) < confidence else (low, middle)
    return high


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted for so many comparisons at once (Holm 1979): the chance that any at all of those below a level
    is an accident is at most that level. NaN stays, and counts as no comparison."""
    known = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(ps), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted
