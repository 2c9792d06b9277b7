"""Histograms of a training step: those that a line of metrics holds, and those that follow from its
numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

BINS = 24
_QUANTILES = {
    "p01": 0.01,
    "p10": 0.1,
    "p25": 0.25,
    "p50": 0.5,
    "p75": 0.75,
    "p90": 0.9,
    "p99": 0.99,
    "max": 1.0,
}


class Histogram(msgspec.Struct, frozen=True):
    """Counts between edges, of which there is one more; the edges rise."""

    edges: tuple[float, ...]
    counts: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Histogram | None:
        """In equal bins; None where no value is finite."""
        known = np.array(values, dtype=np.float64)
        known = known[np.isfinite(known)]
        if not len(known):
            return None
        counts, edges = np.histogram(known, bins=BINS)
        return cls(tuple(edges.tolist()), tuple(counts.tolist()))

    @property
    def middles(self) -> list[float]:
        return [(low + high) / 2 for low, high in pairwise(self.edges)]


def histograms(line: Mapping[str, Any]) -> Iterator[tuple[str, Histogram]]:
    """Of a line of `metrics.jsonl`, by what they are of: the rewards and lengths of its responses, the ages
    of its tokens, and their ratios between the quantiles that it has."""
    for key, value in line.items():
        if key.endswith("/histogram"):
            yield key.removesuffix("/histogram"), msgspec.convert(value, Histogram)
    if by_age := {int(m[1]): n for key, n in line.items() if (m := re.fullmatch(r"age/(\d+)/tokens", key))}:
        ages = range(max(by_age) + 1)
        edges = (-0.5, *(age + 0.5 for age in ages))
        yield "token_age", Histogram(edges, tuple(by_age.get(age, 0.0) for age in ages))
    quantiles = [(line.get(f"ratio/{name}", math.nan), share) for name, share in _QUANTILES.items()]
    if ratios := _between([(at, share) for at, share in quantiles if math.isfinite(at)]):
        yield "ratio", Histogram(ratios.edges, tuple(n * line["trained_tokens"] for n in ratios.counts))


def _between(quantiles: Sequence[tuple[float, float]]) -> Histogram | None:
    """The shares between quantiles, each given with the share of the values that do not exceed it. What lies
    below the least one is counted up to the next. None for fewer than two different ones."""
    edges, counts = [], []
    below = 0.0
    for at, share in quantiles:
        if edges and at <= edges[-1]:
            continue
        if edges:
            counts.append(share - below)
            below = share
        edges.append(at)
    if not counts:
        return None
    return Histogram(tuple(edges), (*counts[:-1], counts[-1] + 1.0 - below))
