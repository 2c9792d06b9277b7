"""`asyncrl.Run`: what a run directory has, as tables."""

from __future__ import annotations

import math
import re
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from asyncrl.observe.histogram import histograms
from asyncrl.observe.samples import as_table
from asyncrl.observe.summary import Summary, summarise
from asyncrl.report.run import (
    columns_of,
    evaluation_of,
    find_run,
    lines_of,
    samples_of,
    settings_of,
    state_of,
    warnings_of,
)
from asyncrl.runfiles.store import read_groups

Table = dict[str, Any]
"""Columns of the same length, by name: `pandas.DataFrame(table)`."""


class Run:
    """A run's directory, whether the run goes on, has ended or was killed. Everything is read when it is
    asked for, so that asking again gives what is new. Raises `ConfigError` for a folder that is no run's."""

    def __init__(self, path: str | Path) -> None:
        self._run = find_run(Path(path))
        self.path = self._run.path

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {self.state}"

    @property
    def state(self) -> str:
        """Whether it goes on, and how many steps are done."""
        return state_of(self._run, time.time())

    @property
    def settings(self) -> Mapping[str, str]:
        """Those that differ from their defaults, by dotted key."""
        return settings_of(self._run)[0]

    @property
    def summary(self) -> Summary:
        """As `summarise`."""
        return summarise(self.path)

    @property
    def metrics(self) -> Table:
        """A row for each step: the numbers of `metrics.jsonl`, NaN in steps without one."""
        columns: Table = dict(columns_of(lines_of(self._run)))
        for name in ("step", "version"):
            if name in columns and np.isfinite(columns[name]).all():
                columns[name] = columns[name].astype(np.int64)
        return columns

    @property
    def warnings(self) -> Table:
        """A row for each warning: its step and text."""
        return _table(("step", "warning"), warnings_of(lines_of(self._run)))

    @property
    def histograms(self) -> Table:
        """A row for each histogram of a step: of what it is, its edges, and the counts between them."""
        rows = [
            (line["step"], name, histogram.edges, histogram.counts)
            for line in lines_of(self._run)
            for name, histogram in histograms(line)
        ]
        return _table(("step", "of", "edges", "counts"), rows)

    @property
    def samples(self) -> Table:
        """A row for each response that was kept."""
        return as_table(samples_of(self._run))

    @property
    def ledger(self) -> Table:
        """A row for each group: its fate, when and by whom it was sampled, its tokens and rewards."""
        try:
            return read_groups(self._run.ledger)
        except sqlite3.OperationalError:
            return {}  # none yet

    @property
    def evaluations(self) -> Table:
        """A row for each evaluation: the version, the set of prompts, and what was measured; NaN for what was
        not."""
        found: dict[tuple[int, str], dict[str, float]] = {}
        for result in evaluation_of(self._run):
            for key, value in result.metrics.items():
                if match := re.fullmatch("eval/([^/]+)/(.+)", key):
                    found.setdefault((result.version, match[1]), {})[match[2]] = value
        names = list(dict.fromkeys(name for row in found.values() for name in row))
        rows = [(*of, *(row.get(name, math.nan) for name in names)) for of, row in found.items()]
        return _table(("version", "set", *names), rows)


def _table(names: tuple[str, ...], rows: Any) -> Table:
    rows = list(rows)
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}
