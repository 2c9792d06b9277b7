"""A sweep from start to end: checks all cells, runs the unfinished ones, and writes the results of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncrl import config as settings
from asyncrl.errors import ConfigError
from asyncrl.event_loop import run_to_end
from asyncrl.observe.metrics import FILE_NAME, read_metrics
from asyncrl.paths import user_path
from asyncrl.plan.machine import probe, visible_gpu
from asyncrl.plan.preflight import preflight
from asyncrl.sweep import plot
from asyncrl.sweep.folder import SweepFolder
from asyncrl.sweep.grid import Axis, Cell, Problems, make_cells, parse_axes
from asyncrl.sweep.progress import SweepProgress
from asyncrl.sweep.results import PointResult, RunFigures, figures, make_rows
from asyncrl.sweep.run import run_cells
from asyncrl.sweep.table import Reading, runs_csv, table_csv, table_md

LAST_STEPS = 10
"""Rewards are averaged over this many steps, or over all steps of a shorter run."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to sweep.

    grid: settings and their values, such as `trainer.lr=1e-4,2e-4`.
    overrides: `key.sub=value`, for all cells.
    seeds: runs at each point of the grid, with seeds counting from `run.seed`.
    jobs: runs at the same time.
    out: the folder of the sweep; None means `run.root/run.name-sweep`.
    gpus: for each run; None leaves it to the run.
    target: report when runs first reach this reward.
    last: steps over which rewards are averaged; None means `LAST_STEPS`.
    """

    config: Path
    grid: Sequence[str] = ()
    overrides: Sequence[str] = ()
    seeds: int = 1
    jobs: int = 1
    out: Path | None = None
    gpus: int | None = None
    target: float | None = None
    last: int | None = None


@dataclass(frozen=True, slots=True)
class SweepResult:
    """failed: cells that did not finish, with the reason. The tables and the plot are in the folder."""

    folder: SweepFolder
    axes: Sequence[Axis]
    reading: Reading
    cells: Sequence[Cell]
    runs: Mapping[Cell, RunFigures]
    rows: Sequence[PointResult]
    failed: Mapping[Cell, str]


def run_sweep(sweep: Sweep) -> SweepResult:
    """Run the cells that no earlier call has finished, print the progress, and write the tables and the plot.

    Raises `ConfigError` for any problem of any cell, before anything is started. On `KeyboardInterrupt`, it
    ends every process and writes the tables of the finished cells first.
    """
    axes = parse_axes(sweep.grid)
    cells = make_cells(sweep.config, axes, sweep.seeds, sweep.overrides)
    reading = Reading(_last(sweep.last, cells), sweep.target)
    lanes = make_lanes(sweep.jobs, sweep.gpus, probe().gpus)
    folder = SweepFolder(sweep.out or _default_folder(sweep))
    _preflight([cell for cell in cells if not folder.is_finished(cell)], folder, sweep.gpus)
    with folder.held():
        todo = [cell for cell in cells if not folder.is_finished(cell)]
        progress = SweepProgress(len(cells), len(cells) - len(todo), sweep.jobs)
        try:
            if todo:
                run_to_end(run_cells(todo, folder, lanes, sweep.gpus, progress))
        finally:
            result = _collect(folder, axes, reading, cells, progress.failed)
            _write(result)
    return result


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
    """Check the cells against this machine, with one seed per point. Raises `ConfigError`."""
    problems = Problems()
    if cells:
        print("checking settings, model and data ...", flush=True)
    for cell in {cell.point: cell for cell in reversed(cells)}.values():
        run = cell.config.run.model_copy(update={"root": str(folder.path)})
        try:
            preflight(cell.config.model_copy(update={"run": run}), gpus)
        except ConfigError as error:
            problems.add(cell.name, str(error))
    problems.raise_if_any()


def _collect(
    folder: SweepFolder,
    axes: Sequence[Axis],
    reading: Reading,
    cells: Sequence[Cell],
    failed: Mapping[Cell, str],
) -> SweepResult:
    runs = {
        cell: figures(read_metrics(folder.run_dir(cell) / FILE_NAME), reading.last, reading.target)
        for cell in cells
        if folder.is_finished(cell)
    }
    return SweepResult(folder, axes, reading, cells, runs, make_rows(cells, runs), failed)


def _write(result: SweepResult) -> None:
    folder = result.folder
    folder.table_csv.write_text(table_csv(result.axes, result.rows, result.reading))
    folder.runs_csv.write_text(runs_csv(result.axes, result.cells, result.runs))
    folder.table_md.write_text(table_md(result.axes, result.rows, result.reading))
    if result.runs and plot.is_possible():
        plot.draw(folder.plot, result.axes, result.rows, result.reading)
