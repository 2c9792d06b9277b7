"""The layout of a sweep's folder, and which of its cells are finished."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.paths import Under
from asyncrl.runfiles.layout import LOCK, held
from asyncrl.sweep.grid import Cell

FINISHED = "finished"
"""A file in the directory of a run that has succeeded, written last."""
OUTPUT = "output.log"
"""The output of a cell's run."""
MAX_NAME_CHARS = 150


@dataclass(frozen=True, slots=True)
class SweepFolder:
    """`table.csv`, `table.md`, `runs.csv`, `plot.png`, and each cell's run directory in `cells/`."""

    path: Path

    table_csv = Under("table.csv")
    table_md = Under("table.md")
    runs_csv = Under("runs.csv")
    plot = Under("plot.png")

    def run_dir(self, cell: Cell) -> Path:
        """Readable, and unique by the cell's key."""
        readable = re.sub(r"[^\w.=-]+", "_", cell.name)[:MAX_NAME_CHARS]
        return self.path / "cells" / f"{readable}-{cell.key}"

    def output(self, cell: Cell) -> Path:
        return self.run_dir(cell) / OUTPUT

    def is_finished(self, cell: Cell) -> bool:
        return (self.run_dir(cell) / FINISHED).exists()

    def make_room(self, cell: Cell) -> Path:
        """An empty directory for the cell's run. Leftovers of an interrupted or failed run are deleted.

        Raises `ConfigError` if that run is still active.
        """
        path = self.run_dir(cell)
        path.mkdir(parents=True, exist_ok=True)
        with held(path, f"{path}: a run of an earlier sweep is still active here; wait until it ends"):
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


def mark_finished(run_dir: Path) -> None:
    """Record that the run in this directory has succeeded."""
    (run_dir / FINISHED).touch()
