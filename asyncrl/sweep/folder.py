"""The layout of a sweep's folder, which of its cells are finished, and what is kept of them."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.observe.metrics import FILE_NAME
from asyncrl.paths import Under
from asyncrl.runfiles.checkpoints import CheckpointError, Checkpoints
from asyncrl.runfiles.layout import LOCK, RunDir, held
from asyncrl.sweep.grid import Cell
from asyncrl.sweep.record import FINISHED, Record, is_scored, read

OUTPUT = "output.log"
"""The output of a cell's run."""
CONFIG = "cell.yaml"
"""The settings of a cell's run."""
KEPT = {LOCK, CONFIG, OUTPUT, FINISHED, FILE_NAME}
MAX_NAME_CHARS = 150


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """`runs.csv`, `curves.csv`, `plot.png`; of a grid `table.csv` and `table.md`, of a comparison
    `report.md` and `curves.png`; and each cell's run directory in `cells/`."""

    path: Path

    table_csv = Under("table.csv")
    table_md = Under("table.md")
    report = Under("report.md")
    runs_csv = Under("runs.csv")
    curves_csv = Under("curves.csv")
    curves = Under("curves.png")
    plot = Under("plot.png")

    def run_dir(self, cell: Cell) -> Path:
        """Readable, and unique by the cell's key."""
        readable = re.sub(r"[^\w.=-]+", "_", cell.name)[:MAX_NAME_CHARS]
        return self.path / "cells" / f"{readable}-{cell.key}"

    def output(self, cell: Cell) -> Path:
        return self.run_dir(cell) / OUTPUT

    def record(self, cell: Cell) -> Record | None:
        """What was kept of a finished cell; None where it has not finished, or its final weights were not
        scored although rows are held out (by a sweep of before that was done)."""
        record = read(self.run_dir(cell) / FINISHED)
        if record is not None and is_scored(cell.config) and math.isnan(record.held_out_reward):
            return None
        return record

    def is_finished(self, cell: Cell) -> bool:
        return self.record(cell) is not None

    def make_room(self, cell: Cell) -> Path:
        """An empty directory for the cell's run. Leftovers of an interrupted or failed run are deleted; one
        that has only not been scored stays, with its weights.

        Raises `ConfigError` if that run is still active.
        """
        path = self.run_dir(cell)
        path.mkdir(parents=True, exist_ok=True)
        with held(path, f"{path}: a run of an earlier sweep is still active here; wait until it ends"):
            try:
                newest = Checkpoints(RunDir(path).checkpoints).newest_whole()
            except CheckpointError:  # all are damaged, as it has said: there is nothing to score
                newest = None
            if newest is not None and newest.step >= cell.config.run.steps:
                return path
            for item in path.iterdir():
                if item.is_dir():
                    shutil.rmtree(item)
                elif item.name != LOCK:
                    item.unlink()
        return path

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other sweeps out of this folder. Raises `ConfigError` if one is using it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--out {self.path}: cannot create this folder: {error.strerror}") from None
        with held(self.path, f"--out {self.path}: another sweep is using this folder; name another one"):
            yield


def thin(run_dir: Path) -> None:
    """Delete what nobody asks of a cell that has ended: weights, batches, TensorBoard's copy. They are most
    of its bytes, and it can be run again by its seed."""
    for item in run_dir.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name not in KEPT:
            item.unlink()
