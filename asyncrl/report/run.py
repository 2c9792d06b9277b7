"""What a report shows of one run, read from its directory: of a run that has ended, goes on or was killed."""

from __future__ import annotations

import math
import shlex
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from asyncrl.collector import without_the_collector
from asyncrl.config import load, yaml_tree
from asyncrl.errors import ConfigError
from asyncrl.observe.metric_table import REQUIRED_KEYS
from asyncrl.observe.metrics import FILE_NAME, last_line, read_metrics
from asyncrl.observe.role_meter import Times, times
from asyncrl.observe.samples import Sample, read_samples
from asyncrl.observe.summary import Summary, summary_of
from asyncrl.paths import user_path
from asyncrl.runfiles.budget import METER_S, Usage
from asyncrl.runfiles.evaluation import Result, Rounds
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.store import read_ledger
from asyncrl.section import flat

QUIET_S = 3 * METER_S
"""A run that says that it lives no more often than this has ended."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """columns: float64[steps] of each metric that is a number; NaN in steps without it. warnings: (step,
    text). settings: those that differ from their defaults, by dotted key. books: as in a line of metrics, and
    `ledger/left_out_tokens`, which are among the dropped ones. failures: failed groups by reason.
    total_steps: that it was to have. seen_at: when it was last certainly going on, in seconds since the
    epoch. Both are None if that is unknown."""

    path: Path
    name: str
    columns: Mapping[str, np.ndarray]
    warnings: Sequence[tuple[int, str]]
    summary: Summary | None
    settings: Mapping[str, str]
    config_text: str
    books: Mapping[str, float]
    failures: Mapping[str, int]
    times: Times
    """Of every role."""
    samples: Sequence[Sample]
    evaluation: Sequence[Result]
    total_steps: int | None
    seen_at: float | None

    @property
    def steps(self) -> int:
        """Finished steps."""
        return int(self.columns["step"][-1]) if "step" in self.columns else 0

    def state(self, now: float) -> str:
        """Whether it goes on, at the time `now` in seconds since the epoch."""
        return _state(self.steps, self.total_steps, self.seen_at, now)

    def commands(self) -> Iterator[tuple[str, str]]:
        """What to do with it, and how."""
        path = shlex.quote(str(self.path))
        if self.config_text:
            config = shlex.quote(str(self.path / "config.yaml"))
            yield "run it again", f"asyncrl-launch --config {config} run.dir=null run.resume=never"
            yield "continue it", f"asyncrl-launch --resume {path}"
        if self.samples:
            yield "read its responses", f"asyncrl samples {path}"


def read_run(path: Path, name: str) -> RunRecord:
    """name: what it is called beside other runs. Raises `ConfigError` for a folder that is no run's, and
    `MetricsError` for a line of metrics that is none."""
    run = RunDir(find_run(path).path.absolute())  # the page may be read elsewhere
    lines = lines_of(run)
    has_all = bool(lines) and all(key in lines[-1] for key in REQUIRED_KEYS)
    books, failures = _books(run.ledger, lines)
    settings, total_steps = settings_of(run)
    summary = summary_of(run.path, lines) if has_all else None
    return RunRecord(
        path=run.path,
        name=name,
        columns=columns_of(lines),
        warnings=warnings_of(lines),
        summary=summary,
        settings=settings,
        config_text=run.config.read_text("utf-8") if run.config.is_file() else "",
        books=books,
        failures=failures,
        times=summary.times if summary else times(lines),
        samples=samples_of(run),
        evaluation=evaluation_of(run),
        total_steps=total_steps,
        seen_at=_seen_at(run.usage),
    )


def find_run(path: Path) -> RunDir:
    """Raises `ConfigError` for a folder that is no run's."""
    run = RunDir(user_path(path, f"{path}"))
    if not run.config.is_file() and not (run.path / FILE_NAME).is_file():
        what = (
            "the folder has neither config.yaml nor metrics.jsonl" if run.path.is_dir() else "no such folder"
        )
        raise ConfigError(f"{path}: no run: {what}; name the folder of a run")
    return run


def lines_of(run: RunDir) -> list[dict[str, Any]]:
    """Of its metrics; none where no step has ended yet."""
    path = run.path / FILE_NAME
    return read_metrics(path) if path.is_file() else []


def state_of(run: RunDir, now: float) -> str:
    """As `RunRecord.state`, without reading all of a long run."""
    return _state(
        last_line(run.path / FILE_NAME).get("step", 0), settings_of(run)[1], _seen_at(run.usage), now
    )


def _state(steps: int, total_steps: int | None, seen_at: float | None, now: float) -> str:
    of = f" of {total_steps:,}" if total_steps else ""
    if total_steps is not None and steps >= total_steps:
        return f"finished: all {total_steps:,} steps are done"
    is_seen = seen_at is not None and now - seen_at < QUIET_S
    return f"{'going on' if is_seen else 'not finished'}: {steps:,}{of} steps are done"


def warnings_of(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """(step, text) of each."""
    return [(line["step"], text) for line in lines for text in _texts(line.get("warnings"))]


def evaluation_of(run: RunDir) -> list[Result]:
    """Of each evaluated version."""
    return [*Rounds(run.evaluation).results().values()]


@without_the_collector()
def columns_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """float64[lines] of each metric that is a number; NaN in lines without it."""
    # A long run has millions of numbers: they are neither looked at nor moved one by one in Python.
    kinds = set().union(*(zip(line, map(type, line.values()), strict=True) for line in lines))
    others = {key for key, kind in kinds if kind not in (int, float)}
    keys = [key for key in dict.fromkeys(chain.from_iterable(lines)) if key not in others]
    unknown = dict.fromkeys(keys, math.nan)
    rows = (map((unknown | line).__getitem__, keys) for line in lines)
    table = np.fromiter(chain.from_iterable(rows), np.float64, len(lines) * len(keys))
    table = table.reshape(len(lines), len(keys))
    return dict(zip(keys, np.ascontiguousarray(table.T), strict=True))


def _texts(value: Any) -> list[str]:
    return value if isinstance(value, list) else []


def settings_of(run: RunDir) -> tuple[dict[str, str], int | None]:
    """The settings that differ from their defaults (all, where another version wrote them that had others),
    and the number of steps."""
    path = run.config
    if not path.is_file():
        return {}, None
    try:
        config = load(path)
    except ConfigError:
        settings = _texts_of(yaml_tree.read(path))
        steps = settings.get("run.steps", "")
        return settings, int(steps) if steps.isdecimal() else None
    return _texts_of(config.model_dump(mode="json", exclude_defaults=True)), config.run.steps


def _texts_of(settings: Mapping[str, Any]) -> dict[str, str]:
    return {key: yaml_tree.text(value) for key, value in flat(settings)}


def _books(ledger: Path, lines: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, float], Mapping[str, int]]:
    """From the ledger file, or else from the last line of metrics, which lacks what came after it."""
    try:
        found = read_ledger(ledger)
    except (sqlite3.Error, OSError):
        found = None
    if found is not None:
        books, left_out = found
        return books.metrics() | {"ledger/left_out_tokens": left_out}, books.failed_groups
    return {key: v for key, v in (lines[-1] if lines else {}).items() if key.startswith("ledger/")}, {}


def samples_of(run: RunDir) -> list[Sample]:
    """Those that were kept so far."""
    try:
        return read_samples(run.path)
    except FileNotFoundError:
        return []


def _seen_at(usage: Path) -> float | None:
    try:
        return Usage.load(usage).seen_at
    except (OSError, ValueError, TypeError):
        return None
