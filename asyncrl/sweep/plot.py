"""Plots a sweep: of a grid the final reward over one setting, with a line for each combination of the others;
of a comparison a panel for each variant."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from asyncrl.sweep.grid import Axis
from asyncrl.sweep.report import Compared, on_the_way, rising
from asyncrl.sweep.results import PointResult, SeedMean
from asyncrl.sweep.table import Reading, short_names

MISSING = "no plot was made because matplotlib is not installed: pip install 'asyncrl[plot]'"
DOTS_PER_INCH = 150
COLUMNS = 4
WAY_METRICS = ("reward/mean", "entropy", "kl/behavior", "ess", "ess/sequence", "clip_frac")
BEHIND = {"color": "0.7", "linewidth": 2}
FRONT = {"color": "C0", "marker": "o", "markersize": 4, "capsize": 3}


def is_possible() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(path: Path, axes: Sequence[Axis], rows: Sequence[PointResult], reading: Reading) -> None:
    """Write a PNG. Points without a finished run are left out; error bars are standard errors."""
    # Imported here because it is an optional extra; not pyplot, which would look for a display.
    from matplotlib.figure import Figure

    across = _across(axes)
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    plot = figure.add_subplot()
    for label, points in _lines(axes, across, rows).items():
        at = [i for i, e in enumerate(points) if not math.isnan(e.mean)]
        means = [points[i].mean for i in at]
        errors = [0.0 if math.isnan(points[i].error) else points[i].error for i in at]
        plot.errorbar(at, means, yerr=errors, label=label, marker="o", markersize=4, capsize=3)
    values = axes[across].values if axes else ("",)
    plot.set_xticks(range(len(values)), values)
    plot.set_xlabel(short_names(axes)[across] if axes else "")
    plot.set_ylabel(f"final reward (mean of the last {reading.last} steps)")
    plot.grid(alpha=0.3)
    if len(axes) > 1:
        others = [name for i, name in enumerate(short_names(axes)) if i != across]
        plot.legend(title=", ".join(others), fontsize="small")
    figure.savefig(path, dpi=DOTS_PER_INCH)


def draw_compared(path: Path, compared: Compared) -> None:
    """Write a PNG: a panel for each variant, over the values of `across`, before the baseline in grey. Error
    bars are 95% intervals."""
    from matplotlib.figure import Figure

    at, variants = rising(compared.at), compared.variants
    columns = min(COLUMNS, max(1, len(variants)))
    rows = -(-len(variants) // columns) or 1
    figure = Figure(figsize=(2.4 * columns + 0.6, 2.0 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat
    for panel in panels[len(variants) :]:
        panel.set_axis_off()
    for panel, variant in zip(panels, variants, strict=False):
        for name, style in ((compared.settings.reference, BEHIND), (variant, FRONT)):
            means = {i: p.mean for i, value in enumerate(at) if (p := compared.points.get((name, value)))}
            half = [0.0 if math.isnan(m.low) else m.mean - m.low for m in means.values()]
            panel.errorbar([*means], [m.mean for m in means.values()], yerr=half, **style)
        panel.set_title(variant, fontsize="small")
        panel.set_xticks(range(len(at)), at)
        panel.grid(alpha=0.3)
    figure.supxlabel(compared.settings.across)
    figure.supylabel(compared.settings.by.replace("_", " "))
    figure.savefig(path, dpi=DOTS_PER_INCH)


def draw_way(path: Path, compared: Compared, curves: Path) -> None:
    """Write a PNG: how the runs at the largest value of `across` went, a line for each variant."""
    from matplotlib.figure import Figure

    at = rising(compared.at)[-1]
    ways = on_the_way(compared, curves, at)
    figure = Figure(figsize=(10.2, 4.6), layout="constrained")
    for panel, metric in zip(figure.subplots(2, 3, sharex=True).flat, WAY_METRICS, strict=True):
        for i, (variant, metrics) in enumerate(ways.items()):
            style = {"color": f"C{i % 10}", "linestyle": ("-", "--")[i // 10 % 2], "label": variant}
            panel.plot(*zip(*metrics.get(metric, [(math.nan, math.nan)]), strict=True), **style)
        panel.set_title(metric, fontsize="small")
        panel.grid(alpha=0.3)
    figure.supxlabel(f"step, at {compared.settings.across} {at}")
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=DOTS_PER_INCH)


def _across(axes: Sequence[Axis]) -> int:
    """Index of the axis to plot over: the first with several values, all of them numbers; else the first."""
    for i, axis in enumerate(axes):
        if len(axis.values) > 1 and all(_is_number(value) for value in axis.values):
            return i
    return 0


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _lines(axes: Sequence[Axis], across: int, rows: Sequence[PointResult]) -> dict[str, list[SeedMean]]:
    """Final rewards along the axis `across`, by the values of the other axes."""
    nothing = SeedMean(math.nan, math.nan, 0)
    lines: dict[str, list[SeedMean]] = {}
    for row in rows:
        values = [value for _, value in row.point]
        label = ", ".join(value for i, value in enumerate(values) if i != across)
        points = lines.setdefault(label, [nothing] * (len(axes[across].values) if axes else 1))
        points[axes[across].values.index(values[across]) if axes else 0] = row.estimates["final_reward"]
    return lines
