"""A sweep from start to end: checks all cells, runs the unfinished ones, and writes the results of all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncrl import config as settings
from asyncrl.cluster.hosts import fork_server
from asyncrl.cluster.hosts.base import visible_gpu
from asyncrl.errors import ConfigError
from asyncrl.event_loop import run_to_end
from asyncrl.observe.metrics import FILE_NAME, read_metrics
from asyncrl.paths import user_path
from asyncrl.plan.machine import probe
from asyncrl.plan.preflight import preflight
from asyncrl.sweep import plot
from asyncrl.sweep.comparison import Comparison
from asyncrl.sweep.folder import SweepFolder
from asyncrl.sweep.grid import Axis, Cell, Grid, Problems, make_cells, parse_axes
from asyncrl.sweep.progress import SweepProgress
from asyncrl.sweep.report import read_runs, report_md
from asyncrl.sweep.results import PointResult, RunFigures, curve, figures, make_rows
from asyncrl.sweep.run import run_cells
from asyncrl.sweep.table import Known, Reading, curves_csv, read_kept, runs_csv, table_csv, table_md

LAST_STEPS = 10
"""Rewards are averaged over this many steps, or over all steps of a shorter run."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to sweep.

    grid: settings and their values, such as `trainer.lr=1e-4,2e-4`. Without any, what is compared is what the
    config's section `sweep` asks for.
    overrides: `key.sub=value`, for all cells.
    seeds: runs at each point of the grid, with seeds counting from `run.seed`; None is one, and what the
    config's section `sweep` says.
    jobs: runs at the same time.
    out: the folder of the sweep; None means `run.root/run.name-sweep`.
    gpus: for each run; None leaves it to the run.
    target: report when runs first reach this reward.
    last: steps over which rewards are averaged; None means `LAST_STEPS`.
    kept: the `runs.csv` and `curves.csv` of an earlier sweep, whose cells count as they are there (by its
    `last` and `target`), and are not run again.
    """

    config: Path
    grid: Sequence[str] = ()
    overrides: Sequence[str] = ()
    seeds: int | None = None
    jobs: int = 1
    out: Path | None = None
    gpus: int | None = None
    target: float | None = None
    last: int | None = None
    kept: Sequence[Path] = ()


@dataclass(frozen=True, slots=True)
class SweepResult:
    """failed: cells that did not finish, with the reason. table: what is to be read first. All tables and the
    plot are in the folder."""

    folder: SweepFolder
    axes: Sequence[Axis]
    reading: Reading
    cells: Sequence[Cell]
    runs: Mapping[Cell, RunFigures]
    rows: Sequence[PointResult]
    failed: Mapping[Cell, str]
    table: Path


def run_sweep(sweep: Sweep) -> SweepResult:
    """Run the cells that no earlier call has finished, print the progress, and write the results.

    Raises `ConfigError` for any problem of any cell, before anything is started. On `KeyboardInterrupt`, it
    ends every process and writes the results of the finished cells first.
    """
    design = make_design(sweep)
    known, _ = design.needed(lambda cell: None)
    reading = Reading(_last(sweep.last, known), sweep.target)
    lanes = make_lanes(sweep.jobs, sweep.gpus, probe().gpus)
    folder = SweepFolder(sweep.out or _default_folder(sweep))
    results = Results(folder, reading, read_kept(*sweep.kept) if sweep.kept else {})
    _preflight(design.to_check(results.waiting(design)), folder, sweep.gpus)
    with folder.held():
        waiting = results.waiting(design)
        progress = SweepProgress(results.total, results.total - results.left, sweep.jobs)
        results.failed = progress.failed

        def still_waiting() -> list[Cell]:
            cells = results.waiting(design)
            progress.total = results.total
            return cells

        try:
            if waiting:
                with fork_server.started() as server:
                    gpus, thins = sweep.gpus, design.thins
                    run_to_end(run_cells(still_waiting, folder, lanes, gpus, progress, thins, server))
        finally:
            result = results.collect(design)
    return result


def make_design(sweep: Sweep) -> Grid | Comparison:
    """The comparison that the config asks for in its section `sweep`; the grid where one is given, or where
    there is no such section."""
    base = settings.load(sweep.config, sweep.overrides)
    if sweep.grid or base.sweep is None:
        axes = parse_axes(sweep.grid)
        seeds = 1 if sweep.seeds is None else sweep.seeds
        return Grid(axes, make_cells(sweep.config, axes, seeds, sweep.overrides))
    if sweep.seeds is not None:
        raise ConfigError(
            f"--seeds {sweep.seeds}: {sweep.config} says in its section `sweep` what is compared; give "
            f"sweep.seeds={sweep.seeds} (and sweep.tuning_seeds), or a --grid"
        )
    return Comparison(sweep.config, sweep.overrides, base, base.sweep)


class Results:
    """What the finished cells of a folder reached.

    failed: the cells that did not finish in this call. total, left: cells of the whole sweep as far as known,
    and of them those that have not ended, when last asked.
    """

    def __init__(self, folder: SweepFolder, reading: Reading, kept: Mapping[str, Known]) -> None:
        self.failed: Mapping[Cell, str] = {}
        self.total = self.left = 0
        self._folder = folder
        self._reading = reading
        self._kept = kept
        self._known: dict[Cell, Known] = {}

    def waiting(self, design: Grid | Comparison) -> list[Cell]:
        """The cells that have not ended, as far as they are known."""
        by = design.settings.by if isinstance(design, Comparison) else "final_reward"

        def reached(cell: Cell) -> float | None:
            if cell in self.failed:
                return -math.inf
            run = self.run(cell)
            return None if run is None else getattr(run, by)

        cells, later = design.needed(reached)
        waiting = [cell for cell in cells if reached(cell) is None]
        self.total, self.left = len(cells) + later, len(waiting) + later
        self._cells = cells
        return waiting

    def run(self, cell: Cell) -> RunFigures | None:
        """The cell's figures; None if it has not finished."""
        if cell not in self._known:
            if (record := self._folder.record(cell)) is not None:
                lines = read_metrics(self._folder.run_dir(cell) / FILE_NAME)
                found = figures(lines, self._reading.last, self._reading.target, record)
                self._known[cell] = Known(found, record, curve(lines))
            elif (known := self._kept.get(cell.key)) is not None:
                self._known[cell] = known
        return self._known[cell].figures if cell in self._known else None

    def collect(self, design: Grid | Comparison) -> SweepResult:
        """Write the results of all finished cells."""
        self.waiting(design)
        cells, folder, reading = self._cells, self._folder, self._reading
        runs = {cell: run for cell in cells if (run := self.run(cell)) is not None}
        rows = make_rows(cells, runs)
        curves = {cell: self._known[cell].curve for cell in runs}
        records = {cell: self._known[cell].record for cell in runs}
        folder.runs_csv.write_text(runs_csv(design.axes, cells, runs, records))
        folder.curves_csv.write_text(curves_csv(design.axes, curves))
        draws = runs and plot.is_possible()
        if isinstance(design, Comparison):
            table, compared = folder.report, read_runs(folder.runs_csv, design.settings)
            table.write_text(report_md(compared))
            if draws:
                plot.draw_compared(folder.plot, compared)
                plot.draw_way(folder.curves, compared, folder.curves_csv)
        else:
            table = folder.table_md
            table.write_text(table_md(design.axes, rows, reading))
            folder.table_csv.write_text(table_csv(design.axes, rows, reading))
            if draws:
                plot.draw(folder.plot, design.axes, rows, reading)
        return SweepResult(folder, design.axes, reading, cells, runs, rows, self.failed, table)


def _last(asked: int | None, cells: Sequence[Cell]) -> int:
    fewest = min(cell.config.run.steps for cell in cells)
    if asked is None:
        return min(LAST_STEPS, fewest)
    if not 1 <= asked <= fewest:
        raise ConfigError(f"--last {asked}: rewards can be averaged over 1 to {fewest} steps (run.steps)")
    return asked


def make_lanes(jobs: int, gpus: int | None, available: int) -> list[dict[str, str]]:
    """The environment of each of `jobs` lanes: the `gpus` available GPUs that its runs see. Raises
    `ConfigError` if there are too few."""
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least one run at a time is needed")
    if gpus is None:
        if jobs > 1 and available:
            raise ConfigError(
                f"--jobs {jobs}: say how many of the {available} GPUs each run may use: --gpus N (0: the CPU)"
            )
        return [{} for _ in range(jobs)]
    if gpus < 0 or jobs * gpus > available:
        raise ConfigError(
            f"--gpus {gpus}: {jobs} runs at a time need {jobs * gpus} GPUs, and this machine has {available}"
        )
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(visible_gpu(i * gpus + k) for k in range(gpus))}
        for i in range(jobs)
    ]


def _default_folder(sweep: Sweep) -> Path:
    run = settings.load(sweep.config, sweep.overrides).run
    return user_path(run.root, f"run.root={run.root}") / f"{run.name}-sweep"


def _preflight(cells: Sequence[Cell], folder: SweepFolder, gpus: int | None) -> None:
    """Check cells against this machine. Raises `ConfigError`."""
    problems = Problems()
    if cells:
        print("checking settings, model and data ...", flush=True)
    for cell in cells:
        run = cell.config.run.model_copy(update={"root": str(folder.path)})
        try:
            preflight(cell.config.model_copy(update={"run": run}), gpus)
        except ConfigError as error:
            problems.add(cell.name, str(error))
    problems.raise_if_any()
