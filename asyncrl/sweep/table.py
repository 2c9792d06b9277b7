"""A sweep's results as CSV for programs, written and read, and as a Markdown table for people."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.sweep.grid import Axis, Cell
from asyncrl.sweep.record import ORIGIN, Record
from asyncrl.sweep.results import CURVE_METRICS, Curve, PointResult, RunFigures, SeedMean
from asyncrl.units import number

FIGURES = tuple(field.name for field in fields(RunFigures))


@dataclass(frozen=True, slots=True)
class Known:
    """What the CSV files say of a cell's run."""

    figures: RunFigures
    record: Record
    curve: Curve


@dataclass(frozen=True, slots=True)
class Reading:
    """How the results were computed from the runs."""

    last: int
    """Steps over which rewards are averaged."""
    target: float | None


def short_names(axes: Sequence[Axis]) -> list[str]:
    """The last part of each key, or the whole key where the last part is ambiguous."""
    last = [axis.key.rpartition(".")[2] for axis in axes]
    return [axis.key if last.count(name) > 1 else name for axis, name in zip(axes, last, strict=True)]


def table_csv(axes: Sequence[Axis], rows: Iterable[PointResult], reading: Reading) -> str:
    """A line for each point of the grid; missing numbers are empty."""
    head = [axis.key for axis in axes] + ["seeds", "missing", "last_steps", "target"]
    for name in FIGURES:
        head += [f"{name}_mean", f"{name}_se", f"{name}_n"]
    lines: list[list[object]] = [[*head]]
    for row in rows:
        line: list[object] = [value for _, value in row.point]
        line += [row.seeds, row.missing, reading.last, reading.target]
        for name in FIGURES:
            estimate = row.estimates[name]
            line += [_or_empty(estimate.mean), _or_empty(estimate.error), estimate.n]
        lines.append(line)
    return _csv(lines)


def runs_csv(
    axes: Sequence[Axis],
    cells: Iterable[Cell],
    runs: Mapping[Cell, RunFigures],
    records: Mapping[Cell, Record],
) -> str:
    """A line for each finished run: its settings, its figures, and where they come from."""
    lines: list[list[object]] = [[*(axis.key for axis in axes), "seed", "use", *FIGURES, *ORIGIN, "cell"]]
    for cell in cells:
        if cell in runs:
            values = [_or_empty(value) for value in astuple(runs[cell])]
            origin = [getattr(records[cell], name) for name in ORIGIN]
            lines.append([*(v for _, v in cell.point), cell.seed, cell.use, *values, *origin, cell.key])
    return _csv(lines)


def curves_csv(axes: Sequence[Axis], curves: Mapping[Cell, Curve]) -> str:
    """Some lines for each finished run: how it went. Rounded to 5 digits."""
    lines: list[list[object]] = [[*(axis.key for axis in axes), "seed", "use", "step", *CURVE_METRICS]]
    for cell, curve in curves.items():
        for step, means in curve:
            values = [_or_empty(means[name], "{:.5g}") for name in CURVE_METRICS]
            lines.append([*(v for _, v in cell.point), cell.seed, cell.use, step, *values])
    return _csv(lines)


def read_kept(runs: Path, curves: Path) -> dict[str, Known]:
    """What `runs_csv` and `curves_csv` have written of a sweep, by the cells' keys. Raises `ConfigError` for
    files that are not there, or are none of theirs."""
    try:
        return _read_kept(runs.read_text(), curves.read_text())
    except OSError as error:
        raise ConfigError(f"{error.filename}: {error.strerror}; name `runs.csv` and `curves.csv`") from None
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"{runs} and {curves} are not what one sweep of this version has written as `runs.csv` and "
            f"`curves.csv`, in this order: {error}"
        ) from None


def _read_kept(runs: str, curves: str) -> dict[str, Known]:
    of_run: dict[tuple[str, ...], list[tuple[int, Mapping[str, float]]]] = {}
    head, *lines = csv.reader(io.StringIO(curves))
    step = head.index("step")
    for line in lines:
        means = dict(zip(CURVE_METRICS, map(_or_nan, line[step + 1 :]), strict=True))
        of_run.setdefault(tuple(line[:step]), []).append((int(line[step]), means))
    head, *lines = csv.reader(io.StringIO(runs))
    first = head.index(FIGURES[0])
    known = {}
    for line in lines:
        row = dict(zip(head, line, strict=True))
        found = RunFigures(**{name: _or_nan(row[name]) for name in FIGURES})
        record = Record(*(row[name] for name in ORIGIN), found.held_out_reward, found.cpu_s)
        known[row["cell"]] = Known(found, record, of_run[tuple(line[:first])])
    return known


def table_md(axes: Sequence[Axis], rows: Sequence[PointResult], reading: Reading) -> str:
    """The table, after a paragraph that explains its numbers."""
    head = [*short_names(axes), "seeds", "final reward", "best reward"]
    if reading.target is not None:
        head += [f"s to {reading.target:g}", f"steps to {reading.target:g}"]
    head.append("tokens")
    body = [_markdown_cells(row, reading) for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return f"{_explained(reading)}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _explained(reading: Reading) -> str:
    n = reading.last
    text = (
        f"Mean ± standard error over the seeds. Final reward: mean of the last {n} steps. Best reward: "
        f"highest mean of {n} consecutive steps. Tokens: sampled in the whole run. The reward of a step is "
        "the mean reward of its batch, which was sampled by weights as old as the step is stale."
    )
    if reading.target is not None:
        text += (
            f" To {reading.target:g}: until the mean of {n} consecutive steps first reached it, over the "
            "runs that did (their number in brackets if not all did)."
        )
    return text


def _markdown_cells(row: PointResult, reading: Reading) -> list[str]:
    seeds = f"{row.seeds}" + (f" ({row.missing} missing)" if row.missing else "")
    of = row.estimates
    cells = [value.replace("|", "\\|") for _, value in row.point]
    cells += [seeds, _estimate(of["final_reward"], 3), _estimate(of["best_reward"], 3)]
    if reading.target is not None:
        for name, digits in (("time_to_target_s", 1), ("steps_to_target", 0)):
            estimate = of[name]
            some = f" ({estimate.n} of {row.seeds})" if estimate.n < row.seeds else ""
            cells.append(_estimate(estimate, digits) + some)
    return [*cells, _estimate(of["generated_tokens"], 0)]


def _estimate(estimate: SeedMean, digits: int) -> str:
    mean = number(estimate.mean, digits)
    return mean if math.isnan(estimate.error) else f"{mean} ± {number(estimate.error, digits)}"


def _or_nan(text: str) -> float:
    return float(text) if text else math.nan


def _or_empty(value: float, form: str | None = None) -> float | str:
    return "" if math.isnan(value) else form.format(value) if form else value


def _csv(lines: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
