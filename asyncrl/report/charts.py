"""Which charts a report has: the most important ones first, then one of every metric, and those by age."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

import numpy as np

from asyncrl.observe.metric_table import GROUPS, METRICS, in_braces, named
from asyncrl.report.chart import Chart, Curve, draw
from asyncrl.report.run import RunRecord

POINTS, FEWEST_POINTS = 1200, 24
"""Points of a chart, shared by its runs; of a run at least so many."""
MOST_POINTS = 600
"""Of one run: more than a screen can tell apart."""

OVERVIEW = (
    *("reward/mean", r"reward/.+/mean", r"reward_of/.+/mean", "kl/behavior", "teacher/kl", "entropy"),
    *("response_tokens/mean", "truncated_frac", "ess", "staleness/mean", "ratio/p50", "clip_frac"),
    *("loss", "grad_norm", "adv/zero_groups_frac", "critic/explained_variance"),
    *("throughput/generated_tokens_per_s", "throughput/trained_tokens_per_s", "idle/trainer", "idle/rollout"),
)
"""Patterns of the metrics that are shown at first, in this order."""
AGES = ("tokens", "kl", "ess", "ratio_mean", "clip_frac", "entropy")
"""Metrics by token age, in the order in which they are shown."""
ELSEWHERE = re.compile(r"step|version|wall_s|schedule/total_steps|(age|state)/.+|eval/.+")
"""What has no chart over steps, or no chart at all."""
UNKNOWN = "Metrics of another version"
MINUTES_UP_TO_S = 3 * 3600


def overview(runs: Sequence[RunRecord]) -> list[Chart]:
    """The charts to see first."""
    charts = [by_step(runs, key) for key in _overview_keys(runs)]
    charts.insert(1, by_time(runs, "reward/mean"))
    return [chart for chart in charts if chart]


def others(runs: Sequence[RunRecord]) -> dict[str, list[Chart]]:
    """A chart of every other metric, by the title of its group in the table of metrics."""
    shown = {*_overview_keys(runs)}
    places = {metric.name: group.title for group in GROUPS for metric in group.metrics}
    found: dict[str, list[Chart]] = {title: [] for title in (*places.values(), UNKNOWN)}
    for key in _keys(runs):
        if key not in shown and not ELSEWHERE.fullmatch(key) and (chart := by_step(runs, key)):
            metric = named(key)
            found[UNKNOWN if metric is None else places[metric.name]].append(chart)
    return {title: charts for title, charts in found.items() if charts}


def by_step(runs: Sequence[RunRecord], key: str) -> Chart | None:
    """A metric over the training steps."""
    curves = [
        _curve(place, run, key, run.columns["step"]) for place, run in enumerate(runs) if _has(run, key)
    ]
    return _chart(curves, key, "training step", len(runs), _edges(key, _keys(runs))[2])


def by_time(runs: Sequence[RunRecord], key: str) -> Chart | None:
    """A metric over wall-clock time."""
    having = [(place, run) for place, run in enumerate(runs) if _has(run, key) and _has(run, "wall_s")]
    longest_s = max((run.columns["wall_s"][-1] for _, run in having), default=0.0)
    unit, unit_s = ("minutes", 60.0) if longest_s <= MINUTES_UP_TO_S else ("hours", 3600.0)
    curves = [_curve(place, run, key, run.columns["wall_s"] / unit_s) for place, run in having]
    name = f"{unit} since the start of the run"
    return _chart(curves, key, name, len(runs), _edges(key, _keys(runs))[2], suffix=", over time")


def by_version(runs: Sequence[RunRecord]) -> list[Chart]:
    """What was scored on held-out prompts."""
    keys = dict.fromkeys(key for run in runs for result in run.evaluation for key in result.metrics)
    charts = []
    for key in (key for key in keys if not key.endswith("/stderr")):
        curves = [_scored(place, run, key) for place, run in enumerate(runs)]
        band = "plus and minus the standard error" if f"{key.removesuffix('mean')}stderr" in keys else ""
        charts.append(_chart(curves, key, "policy version", len(runs), band))
    return [chart for chart in charts if chart]


def _scored(place: int, run: RunRecord, key: str) -> Curve:
    error, having = f"{key.removesuffix('mean')}stderr", [r for r in run.evaluation if key in r.metrics]
    x = np.array([result.version for result in having], dtype=np.float64)
    y = np.array([result.metrics[key] for result in having], dtype=np.float64)
    errors = np.array([result.metrics.get(error, np.nan) for result in having])
    return Curve(place, run.name, x, y, y - errors, y + errors, bars=True)


def by_age(runs: Sequence[RunRecord]) -> list[Chart]:
    """What the tokens of each age were like: means over all steps, weighted by their tokens."""
    charts = []
    for what in AGES:
        curves = [curve for place, run in enumerate(runs) if (curve := _age_curve(place, run, what))]
        metric = METRICS[f"age/{{age}}/{what}"]
        like = METRICS.get(metric.meaning.removeprefix("as `").rstrip("`"), metric)
        is_share = what == "tokens"
        chart = draw(
            curves,
            title="Share of the trained tokens" if is_share else _title(like.meaning),
            key=metric.name,
            x_name="age of the tokens, versions",
            y_name="share of the tokens" if is_share else _with_unit(what, metric.unit),
            points=_points(len(runs)),
            band="from the 1% to the 99% quantile",
        )
        charts += [chart] if chart else []
    return charts


def ages(run: RunRecord) -> list[int]:
    """That its trained tokens had, in versions."""
    found = (re.fullmatch(r"age/(\d+)/tokens", key) for key in run.columns)
    return sorted(int(match[1]) for match in found if match)


def _age_curve(place: int, run: RunRecord, what: str) -> Curve | None:
    at = ages(run)
    if not at:
        return None
    counts = [np.nan_to_num(run.columns[f"age/{age}/tokens"]) for age in at]
    total = sum(float(count.sum()) for count in counts) or 1.0

    def mean(key: str) -> np.ndarray:
        columns = [run.columns.get(f"age/{age}/{key}") for age in at]
        pairs = zip(columns, counts, strict=True)
        return np.array([np.nan if c is None else _weighted(c, weights) for c, weights in pairs])

    x = np.array(at, dtype=np.float64)
    if what == "tokens":
        return Curve(place, run.name, x, np.array([count.sum() / total for count in counts]))
    quantiles = (mean("ratio_p01"), mean("ratio_p99")) if what == "ratio_mean" else (None, None)
    return Curve(place, run.name, x, mean(what), *quantiles)


def _weighted(values: np.ndarray, weights: np.ndarray) -> float:
    known = np.isfinite(values)
    total = weights[known].sum()
    return float((values[known] * weights[known]).sum() / total) if total > 0 else np.nan


def _chart(
    curves: Sequence[Curve], key: str, x_name: str, runs: int, band: str, suffix: str = ""
) -> Chart | None:
    metric = named(key)
    of = [value if len(name) > 1 else f"{name} = {value}" for name, value in in_braces(key).items()]
    return draw(
        curves,
        title=(_title(metric.meaning, of) if metric else key) + suffix,
        key=key,
        x_name=x_name,
        y_name=_with_unit(key, metric.unit if metric else ""),
        points=_points(runs),
        band=band,
    )


def _curve(place: int, run: RunRecord, key: str, x: np.ndarray) -> Curve:
    low, high, _ = _edges(key, run.columns)
    y = run.columns[key]
    if high.endswith("/std"):
        return Curve(place, run.name, x, y, y - run.columns[high], y + run.columns[high])
    return Curve(place, run.name, x, y, run.columns.get(low), run.columns.get(high))


def _edges(key: str, there: Container[str]) -> tuple[str, str, str]:
    """The metrics at the edges of a metric's band, and what the band is; all empty if it has none."""
    stem, _, last = key.rpartition("/")
    deviation, largest, quantiles = f"{stem}/std", f"{stem}/max", (f"{stem}/p01", f"{stem}/p99")
    if last == "mean" and deviation in there:
        return deviation, deviation, f"plus and minus the standard deviation, {deviation}"
    if last == "p50" and all(quantile in there for quantile in quantiles):
        return *quantiles, f"from {quantiles[0]} to {quantiles[1]}"
    # One extreme weight would make all others a flat line.
    if last == "mean" and largest in there and quantiles[1] not in there:
        return key, largest, f"up to {largest}"
    return "", "", ""


def _has(run: RunRecord, key: str) -> bool:
    return key in run.columns


def _keys(runs: Sequence[RunRecord]) -> dict[str, None]:
    """Of all runs, each once."""
    return dict.fromkeys(key for run in runs for key in run.columns)


def _overview_keys(runs: Sequence[RunRecord]) -> list[str]:
    keys = _keys(runs)
    return list(dict.fromkeys(key for like in OVERVIEW for key in keys if re.fullmatch(like, key)))


def _points(runs: int) -> int:
    return min(MOST_POINTS, max(FEWEST_POINTS, POINTS // runs))


def _title(meaning: str, of: Sequence[str] = ()) -> str:
    """of: what the parts in braces of the metric's name stand for."""
    text = meaning.replace("`", "")
    return text[:1].upper() + text[1:] + (f": {', '.join(of)}" if of else "")


def _with_unit(name: str, unit: str) -> str:
    return f"{name}, {unit or 'no unit'}"
