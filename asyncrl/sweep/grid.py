"""Expands a config and a grid of settings into the runs of a sweep, its cells."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from asyncrl import config as settings
from asyncrl.config import Config, yaml_tree
from asyncrl.errors import ConfigError

OF_THE_SWEEP = {
    "run.seed": "the sweep sets the seeds itself, counting from run.seed: use --seeds N (or "
    "sweep.seeds, in a config with a section `sweep`)",
    "run.dir": "the sweep gives every run its own directory, below --out DIR",
    "run.root": "the sweep gives every run its own directory, below --out DIR",
    "run.name": "the sweep names its runs by their place in the grid",
}
"""Settings that a grid cannot vary, with the reason."""
SHOWN_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class Axis:
    """A setting and its values, in the given order, each as YAML text."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One run of the sweep.

    point: its place in the grid, a (key, value) pair for each axis, with the values as they were written.
    use: what it is for: a result, or only the tuning of others.
    config: its resolved settings, apart from where it runs (`run.name`, `run.root`, `run.dir`) and what it is
    compared with (`sweep`).
    """

    point: tuple[tuple[str, str], ...]
    seed: int
    config: Config
    use: Literal["result", "tuning"] = "result"

    @property
    def name(self) -> str:
        """A readable name: `fixed_lag=4 policy_loss=ppo seed=1`."""
        return " ".join(
            [*(f"{key.rpartition('.')[2]}={value}" for key, value in self.point), f"seed={self.seed}"]
        )

    @property
    def key(self) -> str:
        """A digest of the resolved settings. A cell with the same settings is the same cell, whatever grid it
        came from, and whatever settings have been added since. (Code and defaults that have changed are not
        seen.)"""
        tree = self.config.model_dump(mode="json", exclude_defaults=True)
        run = tree.pop("run", {})  # none, where all of it has its defaults
        tree["run"] = {name: value for name, value in run.items() if name not in ("name", "root", "dir")}
        tree.pop("sweep", None)
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]

    def placed(self, run_dir: Path) -> Config:
        """The settings for its run in `run_dir`."""
        tree = self.config.model_dump(mode="json")
        tree["run"] |= {"name": _folder_name(self.name), "dir": str(run_dir)}
        del tree["sweep"]
        return settings.from_tree(tree)


def _folder_name(name: str) -> str:
    """A valid `run.name`: values of the grid can be paths, and long."""
    return re.sub(r"[/\\\0-\x1f\x7f]+", "-", name).lstrip(".")[:100]


def parse_axes(grid: Iterable[str]) -> list[Axis]:
    """Axes from texts like `trainer.lr=1e-4,2e-4`. Raises `ConfigError`."""
    axes: list[Axis] = []
    for text in grid:
        key, values = yaml_tree.values(text)
        if key in OF_THE_SWEEP:
            raise ConfigError(f"--grid {text}: {OF_THE_SWEEP[key]}")
        if not values:
            raise ConfigError(f"--grid {text}: it has no value; write --grid {key}=VALUE,VALUE")
        if any(axis.key == key for axis in axes):
            raise ConfigError(
                f"--grid {text}: `{key}` is in the grid twice; give all its values in one --grid"
            )
        axes.append(Axis(key, tuple(values)))
    return axes


def make_cells(
    config: Path, axes: Sequence[Axis], seeds: int, overrides: Sequence[str] = ()
) -> tuple[Cell, ...]:
    """Every point of the grid with every seed: the whole grid for one seed before the next, so that an
    interrupted sweep has covered all points.

    Raises `ConfigError` with every problem of every cell.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: each point needs at least one run")
    base = settings.load(config, overrides)
    if base.run.dir is not None:
        raise ConfigError(f"run.dir={base.run.dir}: {OF_THE_SWEEP['run.dir']}")
    points = list(itertools.product(*([(axis.key, value) for value in axis.values] for axis in axes)))
    cells, problems = [], Problems()
    for seed in range(base.run.seed, base.run.seed + seeds):
        for point in points:
            texts = [f"{key}={value}" for key, value in point]
            try:
                resolved = settings.load(config, [*overrides, *texts, f"run.seed={seed}"])
            except ConfigError as error:
                for line in str(error).split("\n"):  # one per wrong key
                    problems.add(" ".join(texts), line)
            else:
                cells.append(Cell(point, seed, resolved))
    problems.raise_if_any()
    _refuse_equal(cells)
    return tuple(cells)


class Problems:
    """Collects the problems of cells; many cells share a problem."""

    def __init__(self) -> None:
        self._cells: dict[str, list[str]] = {}

    def add(self, cell: str, problem: str) -> None:
        cells = self._cells.setdefault(problem, [])
        if cell not in cells:
            cells.append(cell)

    def raise_if_any(self) -> None:
        """Raise `ConfigError` with each problem once and where it was found."""
        if not self._cells:
            return
        lines = [f"{problem}\n  at {_some(cells)}" for problem, cells in self._cells.items()]
        more = len(lines) - SHOWN_PROBLEMS
        raise ConfigError(
            "\n".join([*lines[:SHOWN_PROBLEMS], *([f"... and {more} more problems"] if more > 0 else [])])
        )


def _some(cells: Sequence[str]) -> str:
    first = cells[0] or "every point"
    return first if len(cells) == 1 else f"{first} and {len(cells) - 1} more points of the grid"


def _refuse_equal(cells: Iterable[Cell]) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.key, cell)
        if other is not cell:
            raise ConfigError(
                f"--grid: `{other.name}` and `{cell.name}` have the same settings; give each value once"
            )


@dataclass(frozen=True, slots=True)
class Grid:
    """Every combination of the axes' values, with every seed."""

    axes: Sequence[Axis]
    cells: Sequence[Cell]
    thins = False

    def needed(self, reached: Callable[[Cell], float | None]) -> tuple[Sequence[Cell], int]:
        """All of them, whatever any reached; none will follow."""
        return self.cells, 0

    def to_check(self, cells: Sequence[Cell]) -> list[Cell]:
        """One seed of each point."""
        return [*{cell.point: cell for cell in reversed(cells)}.values()]
