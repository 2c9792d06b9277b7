"""What a comparison's runs say: from `runs.csv` to tables in which every claim has its difference, its
interval and its number of runs. Nothing here looks at anything but that file."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from asyncrl.config import SweepConfig, yaml_tree
from asyncrl.sweep.choice import ByValue, is_contested, nested, ranked
from asyncrl.sweep.record import ORIGIN
from asyncrl.sweep.results import ALONG_THE_WAY, CURVE_METRICS
from asyncrl.sweep.statistics import CONFIDENCE, Interval, holm, interval
from asyncrl.units import number

Row = Mapping[str, str]
LEVEL = 1 - CONFIDENCE
FEWEST_PAIRS = 3
SAME = "cannot be told apart"
VARIANT = "variant"
"""The column of the variants; those of `sweep.across` and `sweep.tune` have the settings' keys."""


@dataclass(frozen=True, slots=True)
class Point:
    """A variant at a value of `across`: for each reported seed the run that stands for it, with the tuned
    value that the other seeds chose."""

    runs: Mapping[int, Row]
    reached: Mapping[int, float]
    tuned: Sequence[str]
    """The values that were chosen, the most frequent first."""
    choosing: ByValue
    """What the runs reached that choose and are not reported."""

    @property
    def mean(self) -> Interval:
        return interval([*self.reached.values()])

    def less(self, other: Point) -> Interval:
        """Of the differences, this one minus the other, of equal seeds."""
        return interval(
            [self.reached[seed] - other.reached[seed] for seed in self.reached.keys() & other.reached.keys()]
        )


@dataclass(frozen=True, slots=True)
class Compared:
    """settings: what was compared. at: the values of `across` in the order of the settings, and then of the
    file; the others are compared with the first. points: by variant and value, those that have a reported
    run."""

    settings: SweepConfig
    rows: Sequence[Row]
    at: Sequence[str]
    points: Mapping[tuple[str, str], Point]

    @property
    def variants(self) -> list[str]:
        return [*dict.fromkeys(variant for variant, _ in self.points)]


@dataclass(frozen=True, slots=True)
class Claim:
    """A difference. p: for all claims of its table at once (Holm)."""

    variant: str
    at: str
    difference: Interval
    p: float

    @property
    def verdict(self) -> str:
        if math.isnan(self.p) or self.difference.n < FEWEST_PAIRS:
            return "too few runs"
        return SAME if self.p >= LEVEL else "**better**" if self.difference.mean > 0 else "**worse**"


def read_runs(path: Path, settings: SweepConfig) -> Compared:
    """From a comparison's `runs.csv`; each figure is chosen by nested selection."""
    with path.open(newline="") as file:
        rows = [*csv.DictReader(file)]
    across = settings.across
    by_point: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_point.setdefault((row[VARIANT], row[across]), []).append(row)
    points = {key: _point(of_point, settings.tune, settings.by) for key, of_point in by_point.items()}
    asked, there = map(yaml_tree.text, settings.across_values), dict.fromkeys(row[across] for row in rows)
    at = [*dict.fromkeys([*(value for value in asked if value in there), *there])]
    return Compared(settings, rows, at, {key: point for key, point in points.items() if point.runs})


def _point(rows: Iterable[Row], tune: str, by: str) -> Point:
    found: dict[str, dict[int, float]] = {}
    runs, tuning = {}, set()
    for row in rows:
        seed = int(row["seed"])
        found.setdefault(row[tune], {})[seed] = float(row[by])
        runs[row[tune], seed] = row
        if row["use"] == "tuning":
            tuning.add(seed)
    chosen = nested(found, sorted(tuning))
    values = [value for value, _ in chosen.values()]
    return Point(
        {seed: runs[value, seed] for seed, (value, _) in chosen.items()},
        {seed: reached for seed, (_, reached) in chosen.items()},
        sorted(dict.fromkeys(values), key=lambda value: -values.count(value)),
        {value: {seed: of[seed] for seed in tuning if seed in of} for value, of in found.items()},
    )


def costs(compared: Compared) -> list[Claim]:
    """Of every variant, each value of `across` minus the first."""
    first = compared.at[0]
    return _claims(compared, lambda variant, at: (variant, first) if at != first else None)


def advantages(compared: Compared) -> list[Claim]:
    """At every value of `across`, each variant minus the baseline."""
    reference = compared.settings.reference
    return _claims(compared, lambda variant, at: (reference, at) if variant != reference else None)


def on_the_way(compared: Compared, path: Path, at: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """From a comparison's `curves.csv`: of each variant at this value of `across` and each metric, (step,
    mean over the reported runs)."""
    settings = compared.settings
    reported = {
        (variant, row[settings.tune], row["seed"])
        for (variant, value), point in compared.points.items()
        if value == at
        for row in point.runs.values()
    }
    values: dict[str, dict[str, dict[int, list[float]]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            variant, step = row[VARIANT], int(row["step"])
            if row[settings.across] == at and (variant, row[settings.tune], row["seed"]) in reported:
                for metric in CURVE_METRICS:
                    if row[metric]:
                        by_step = values.setdefault(variant, {}).setdefault(metric, {})
                        by_step.setdefault(step, []).append(float(row[metric]))
    return {
        variant: {m: [(s, fmean(v)) for s, v in sorted(steps.items())] for m, steps in of_variant.items()}
        for variant, of_variant in values.items()
    }


def _claims(compared: Compared, other_of: Callable[[str, str], tuple[str, str] | None]) -> list[Claim]:
    pairs = {
        key: point.less(compared.points[other])
        for key, point in _in_order(compared)
        if (other := other_of(*key)) is not None and other in compared.points
    }
    ps = holm([difference.p for difference in pairs.values()])
    return [Claim(*key, difference, p) for (key, difference), p in zip(pairs.items(), ps, strict=True)]


def _in_order(compared: Compared) -> Iterator[tuple[tuple[str, str], Point]]:
    """Variant by variant, and of each the values of `across` in rising order."""
    for variant in compared.variants:
        for at in rising(compared.at):
            if point := compared.points.get((variant, at)):
                yield (variant, at), point


def rising(values: Sequence[str]) -> list[str]:
    """Numbers in their order, anything else as it is."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return [*values]


def report_md(compared: Compared) -> str:
    """All tables, in Markdown, each after what it says."""
    if not compared.points:
        return "No variant has a reported run yet.\n"
    settings = compared.settings
    across, first, reference = _short(settings.across), compared.at[0], settings.reference
    parts = [
        _explained(compared),
        _in_words(costs(compared), f"From {across} {first} to")
        + _in_words(advantages(compared), f"Beside `{reference}` at {across}")
        + _in_doubt(compared),
        _table(["variant", *(f"{across} {at}" for at in rising(compared.at))], _levels(compared)),
        f"**The cost of {across}**: each value minus {across} {first} of the same variant.\n",
        _claims_table(compared, costs(compared)),
        f"**Beside `{reference}`**: each variant minus `{reference}` at the same {across}.\n",
        _claims_table(compared, advantages(compared)),
        f"**The choice of `{settings.tune}`**: mean of the runs that choose; in bold what is reported.\n",
        _table(["variant", across, *_tried(compared)], _choices(compared)),
        "**On the way**: means over the same runs and the last steps' batches: their reward, which is that "
        f"of weights as old as they are stale, and `{'`, `'.join(ALONG_THE_WAY.values())}`.\n",
        _table(["variant", across, "reward", *ALONG_THE_WAY], _ways(compared)),
    ]
    return "\n".join(parts)


def _explained(compared: Compared) -> str:
    settings, rows = compared.settings, compared.rows
    results = sum(row["use"] == "result" for row in rows)
    figures = sum(len(point.runs) for point in compared.points.values())
    second = f", {results - figures} of values beside which others were chosen" * (results > figures)
    tuning_seeds = len({row["seed"] for row in rows if row["use"] == "tuning"})
    what = {
        "held_out_reward": "mean reward of the final weights on the held-out rows",
        "final_reward": "mean reward of the last steps' batches, sampled by weights as old as they are stale",
    }[settings.by]
    cpu_h = math.fsum(float(row["cpu_s"] or 0) for row in rows) / 3600
    origins = "; ".join(", ".join(dict.fromkeys(row[name] for row in rows)) for name in ORIGIN)
    return (
        f"Figures: {what}; {CONFIDENCE:.0%} intervals of Student's t over seeds. At every point the "
        f"`{settings.tune}` of a figure was chosen by runs of other seeds: those that are not reported and, "
        "where two values have all seeds, the other reported ones, too. Runs: "
        f"{len(rows) - results} to choose by (seeds a value: {tuning_seeds}), {figures} reported{second}. "
        "Differences are of pairs of equal seeds; p is corrected for all comparisons "
        f"of its table (Holm), intervals are not, and what is not below {LEVEL:.2g} cannot be told apart by "
        f"so many runs. {cpu_h:.1f} hours of processor time. Commit; machine; torch: {origins}.\n"
    )


def _in_words(claims: Sequence[Claim], where: str) -> str:
    """A line for each value of `across`: the variants by their verdicts, the largest difference first."""
    lines = []
    for at in rising([*dict.fromkeys(claim.at for claim in claims)]):
        said: dict[str, list[str]] = {}
        of_at = [claim for claim in claims if claim.at == at]
        for claim in sorted(of_at, key=lambda claim: -abs(claim.difference.mean)):
            of_variant = f"`{claim.variant}` {claim.difference.mean:+.3f} ({_between(claim)})"
            said.setdefault(claim.verdict, []).append(of_variant)
        verdicts = "; ".join(f"{verdict}: {', '.join(of)}" for verdict, of in said.items())
        lines.append(f"- {where} {at}: {verdicts}.\n")
    return "".join(lines)


def _in_doubt(compared: Compared) -> str:
    """Lines that name what other seeds, further values or missing runs might undo of a claim."""
    torn, at_edge, lacking, settings = [], [], [], compared.settings
    most = max(len(point.runs) for point in compared.points.values())
    keys = VARIANT, settings.across, settings.tune
    reported = {tuple(row[key] for key in keys) for row in compared.rows if row["use"] == "result"}
    for (variant, at), point in _in_order(compared):
        values, where = rising([*point.choosing]), f"`{variant}` at {_short(settings.across)} {at}"
        seeds = {seed for of in point.choosing.values() for seed in of}
        best, *others = ranked(point.choosing, seeds)
        if is_contested(point.choosing, seeds) and (variant, at, others[0]) not in reported:
            torn.append(f"{where} ({best} or {others[0]})")
        if best in (values[0], values[-1]) and others:
            at_edge.append(f"{where} ({best})")
        if len(point.runs) < most:
            lacking.append(f"{where} ({len(point.runs)} of {most})")
    tune = f"`{settings.tune}`"
    lines = {
        f"The runs that choose {tune} disagree on the better of its two best values; of the one that is not "
        "reported nothing more is known": torn,
        f"The best {tune} is at the edge of what was tried; beyond it may be a better one": at_edge,
        "Some reported runs failed or were not run; the figures are of the others, which flatters what "
        "fails": lacking,
    }
    return "".join(f"- {what}: {', '.join(points)}.\n" for what, points in lines.items() if points)


def _between(claim: Claim) -> str:
    d = claim.difference
    interval_of = "" if math.isnan(d.low) else f"{d.low:+.3f} to {d.high:+.3f}; "
    return f"{interval_of}{d.n} pairs"


def _levels(compared: Compared) -> Iterator[list[str]]:
    for variant in compared.variants:
        points = [compared.points.get((variant, at)) for at in rising(compared.at)]
        yield [f"`{variant}`", *("-" if point is None else _level(point) for point in points)]


def _level(point: Point) -> str:
    mean = point.mean
    between = "" if math.isnan(mean.low) else f" [{mean.low:.3f}, {mean.high:.3f}]"
    return f"{mean.mean:.3f}{between}, {mean.n} at {', '.join(point.tuned)}"


def _claims_table(compared: Compared, claims: Sequence[Claim]) -> str:
    if not claims:
        return "No pair of runs yet.\n"
    head = ["variant", _short(compared.settings.across), "difference", f"{CONFIDENCE:.0%} interval", "pairs"]
    lines = []
    for claim in claims:
        d = claim.difference
        between = "-" if math.isnan(d.low) else f"{d.low:+.3f} to {d.high:+.3f}"
        p = "-" if math.isnan(claim.p) else f"{claim.p:.3g}"
        lines.append([f"`{claim.variant}`", claim.at, f"{d.mean:+.3f}", between, str(d.n), p, claim.verdict])
    return _table([*head, "p", "verdict"], lines)


def _tried(compared: Compared) -> list[str]:
    return rising([*dict.fromkeys(value for point in compared.points.values() for value in point.choosing)])


def _choices(compared: Compared) -> Iterator[list[str]]:
    for (variant, at), point in _in_order(compared):
        means = {value: interval([*of.values()]).mean for value, of in point.choosing.items()}
        told = {v: f"**{m:.3f}**" if v in point.tuned else number(m, 3) for v, m in means.items()}
        yield [f"`{variant}`", at, *(told.get(value, "-") for value in _tried(compared))]


def _ways(compared: Compared) -> Iterator[list[str]]:
    for (variant, at), point in _in_order(compared):
        columns = ("final_reward", *ALONG_THE_WAY)
        known = {c: [float(row[c]) for row in point.runs.values() if row[c]] for c in columns}
        yield [f"`{variant}`", at, *(number(interval(known[c]).mean, 3) for c in columns)]


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, ["---"] * len(head), *lines])


def _short(key: str) -> str:
    return key.rpartition(".")[2]
