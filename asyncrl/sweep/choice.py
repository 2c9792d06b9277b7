"""Chooses the best of a tuned setting's values without being flattered by the choice."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

ByValue = Mapping[str, Mapping[int, float]]
"""For each value of the tuned setting, what its runs reached, by seed. A run that failed is -inf."""


def ranked(found: ByValue, seeds: Iterable[int]) -> list[str]:
    """The values that were run with all these seeds, the best mean first; of equal ones the first."""
    seeds = list(seeds)
    means = {
        value: statistics.fmean(runs[seed] for seed in seeds)
        for value, runs in found.items()
        if all(seed in runs for seed in seeds)
    }
    return sorted(means, key=lambda value: -means[value])


def next_value(found: ByValue, seeds: Iterable[int]) -> str | None:
    """The value beyond the edge, where the best is there; None where it is not. Of numbers in any order, by
    the factor between the last two."""
    numbers = sorted(found, key=float)
    best = ranked(found, seeds)[0]
    if len(numbers) > 1 and all(math.isfinite(found[best][seed]) for seed in seeds):
        for edge, inner in ((numbers[0], numbers[1]), (numbers[-1], numbers[-2])):
            if best == edge:
                return f"{float(edge) ** 2 / float(inner):.6g}"
    return None


def is_contested(found: ByValue, seeds: Iterable[int]) -> bool:
    """Whether a seed has the second-best mean's value above the best one's."""
    best, *others = ranked(found, seeds := [*seeds])
    return bool(others) and any(found[others[0]][seed] > found[best][seed] for seed in seeds)


def nested(found: ByValue, tuning: Sequence[int]) -> dict[int, tuple[str, float]]:
    """For each reported seed, the value that all other seeds choose, and what that seed reached with it.

    tuning: seeds that choose and are not reported. Where the best value by these has runs with other seeds,
    all values that have such runs take part. A run that is not there counts as the worst, as one that failed;
    a seed whose choice has no run with it is left out. Nothing that a figure comes from had a part in the
    choice that it is reported for, so that the best of several is not the luckiest of several (Varma and
    Simon 2006). But where values are about equal, a figure has a part in the choices of the others: their
    mean scatters more than independent ones would, and Student's interval of 95% holds it in about 90% of
    cases (two equal values, 2 seeds that choose and 8 that are reported, normal noise).
    """
    order = ranked(found, tuning)
    reported = {value: found[value].keys() - set(tuning) for value in order}
    if not order or not reported[order[0]]:
        return {}
    seeds = sorted(set().union(*reported.values()))
    ran = {value: dict.fromkeys(seeds, -math.inf) | found[value] for value in order if reported[value]}
    chosen = {}
    for seed in seeds:
        value = ranked(ran, [*tuning, *(other for other in seeds if other != seed)])[0]
        if seed in found[value]:
            chosen[seed] = (value, found[value][seed])
    return chosen
