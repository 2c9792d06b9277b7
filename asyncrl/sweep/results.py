"""The results of runs, and their means and standard errors over the seeds of a point."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from asyncrl.sweep.grid import Cell
from asyncrl.sweep.record import Record


@dataclass(frozen=True, slots=True)
class RunFigures:
    """The results of a finished run. A step's reward is the mean reward of its batch, which was sampled by
    weights as many versions old as the batch is stale."""

    final_reward: float
    """Mean reward of the last N steps."""
    best_reward: float
    """Highest mean reward of N consecutive steps."""
    steps_to_target: float
    """Steps until the mean reward of N consecutive steps first reached the target; NaN if it never did."""
    time_to_target_s: float
    """The same in seconds from the start of the run."""
    generated_tokens: float
    """Tokens sampled in the whole run, trained on or not."""
    trained_tokens: float
    wall_s: float
    held_out_reward: float = math.nan
    """Mean reward of the final weights on `data.held_out_rows`."""
    cpu_s: float = math.nan
    """Processor time of the run and its evaluation."""
    entropy: float = math.nan
    """This and what follows: the mean over the last N steps of the metric of that name (docs/metrics.md)."""
    clip_frac: float = math.nan
    ess: float = math.nan
    ess_sequence: float = math.nan
    kl_behavior: float = math.nan
    drift_kl: float = math.nan
    log_ratio_second_moment: float = math.nan


ALONG_THE_WAY = {
    **{name: name for name in ("entropy", "clip_frac", "ess")},
    "ess_sequence": "ess/sequence",
    "kl_behavior": "kl/behavior",
    "drift_kl": "drift/kl",
    "log_ratio_second_moment": "log_ratio/second_moment",
}
"""The figures that show a policy drift or collapse, and their metrics."""
CURVE_METRICS = ("reward/mean", *ALONG_THE_WAY.values(), "grad_norm", "response_tokens/mean")
CURVE_POINTS = 20
Curve = Sequence[tuple[int, Mapping[str, float]]]
"""A run's `CURVE_METRICS` along the way: the last step of a part of the run, and the means over it."""


def figures(
    lines: Sequence[Mapping[str, Any]], last: int, target: float | None, record: Record | None = None
) -> RunFigures:
    """From the lines of a run's `metrics.jsonl`, and what was kept at its end. `last` is N above; a run with
    fewer steps uses all of them."""
    last = min(last, len(lines))
    rewards = [line["reward/mean"] for line in lines]
    means = [statistics.fmean(rewards[end - last : end]) for end in range(last, len(rewards) + 1)]
    reached = next((i for i, mean in enumerate(means) if target is not None and mean >= target), None)
    at = None if reached is None else lines[reached + last - 1]
    return RunFigures(
        final_reward=means[-1],
        best_reward=max(means),
        steps_to_target=math.nan if at is None else float(at["step"]),
        time_to_target_s=math.nan if at is None else at["wall_s"],
        generated_tokens=float(lines[-1]["ledger/generated_tokens"]),
        trained_tokens=float(lines[-1]["ledger/trained_tokens"]),
        wall_s=lines[-1]["wall_s"],
        held_out_reward=math.nan if record is None else record.held_out_reward,
        cpu_s=math.nan if record is None else record.cpu_s,
        **{name: mean_of(lines[-last:], metric) for name, metric in ALONG_THE_WAY.items()},
    )


def mean_of(lines: Iterable[Mapping[str, Any]], metric: str) -> float:
    """Over the lines that have it; NaN if none does."""
    known = [line[metric] for line in lines if not math.isnan(line.get(metric, math.nan))]
    return statistics.fmean(known) if known else math.nan


def curve(lines: Sequence[Mapping[str, Any]]) -> Curve:
    """From the lines of a run's `metrics.jsonl`, in about `CURVE_POINTS` parts."""
    size = max(1, math.ceil(len(lines) / CURVE_POINTS))
    parts = [lines[start : start + size] for start in range(0, len(lines), size)]
    return [(part[-1]["step"], {name: mean_of(part, name) for name in CURVE_METRICS}) for part in parts]


@dataclass(frozen=True, slots=True)
class SeedMean:
    """A mean over seeds and its standard error: sample standard deviation (n - 1) / sqrt(n), NaN for n <
    2."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> SeedMean:
        """Over the values that are not NaN; the mean of no values is NaN."""
        known = [value for value in values if not math.isnan(value)]
        if not known:
            return cls(math.nan, math.nan, 0)
        error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else math.nan
        return cls(statistics.fmean(known), error, len(known))


@dataclass(frozen=True, slots=True)
class PointResult:
    """A point of the grid."""

    point: tuple[tuple[str, str], ...]
    seeds: int
    """Finished runs."""
    missing: int
    """Runs that failed or have not been run."""
    estimates: Mapping[str, SeedMean]
    """By the names of `RunFigures`."""


def make_rows(cells: Iterable[Cell], runs: Mapping[Cell, RunFigures]) -> list[PointResult]:
    """A row for each point of the grid, in the order of `cells`. `runs` has the finished cells."""
    points: dict[tuple[tuple[str, str], ...], list[Cell]] = {}
    for cell in cells:
        points.setdefault(cell.point, []).append(cell)
    rows = []
    for point, of_point in points.items():
        done = [runs[cell] for cell in of_point if cell in runs]
        estimates = {
            field.name: SeedMean.of(getattr(run, field.name) for run in done) for field in fields(RunFigures)
        }
        rows.append(PointResult(point, len(done), len(of_point) - len(done), estimates))
    return rows
