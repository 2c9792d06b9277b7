"""`metrics.jsonl`: one JSON object per training step, written by the trainer and read by everything else."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.collector import without_the_collector
from asyncrl.core.invariants import InvariantError
from asyncrl.errors import AsyncRLError
from asyncrl.observe.histogram import Histogram
from asyncrl.observe.metric_table import REQUIRED_KEYS
from asyncrl.observe.tail import LineTail
from asyncrl.paths import replace_file

FILE_NAME = "metrics.jsonl"
TAIL_BYTES = 1 << 20
"""Of the file's end, where only the last line is asked for."""

Value = float | int | str | list[str] | list[dict[str, "Value"]] | Histogram | None


class MetricsError(AsyncRLError, ValueError):
    """A line of metrics is wrong; the message says which one, and why."""


class MetricsWriter(AbstractContextManager["MetricsWriter"]):
    """Appends to `metrics.jsonl` in the run directory.

    When `write` returns, the operating system has the line: killing the process loses none.

    after_step: the step that the run continues from. On opening, later lines are removed, and so is one that
    a crash cut short.
    """

    def __init__(self, run_dir: str | Path, after_step: int = 0) -> None:
        self._path = path = Path(run_dir) / FILE_NAME
        kept = cut_after(path, after_step)
        self.last_wall_s: float = kept["wall_s"] if kept is not None else 0.0
        """`wall_s` of the last line that was kept: the time that the run has already taken."""
        self._file = path.open("ab")
        self._last_step = after_step

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one step. Values are numbers (including numpy's and tensors of one element), strings, lists
        of strings or of mappings to values, or histograms; numbers that are not finite are written as null.

        Raises `MetricsError` if a required key is missing or the step does not increase, and `InvariantError`
        if the ledger does not close.
        """
        values = {key: _plain(key, value) for key, value in line.items()}
        step = _check_line(values, self._last_step)
        self._file.write(msgspec.json.encode(values) + b"\n")
        self._file.flush()
        self._last_step = step

    def amend(self, more: Mapping[str, Any]) -> None:
        """Add to the line of the last step, which may be of before the run was resumed, what has become known
        of it."""
        values = {key: _plain(key, value) for key, value in more.items()}
        *before, last = self._path.read_bytes().splitlines(keepends=True) or [b""]
        if not values or not last:
            return
        self._file.close()
        whole = msgspec.json.encode(msgspec.json.decode(last, type=dict[str, Any]) | values)
        replace_file(self._path, b"".join([*before, whole, b"\n"]))
        self._file = self._path.open("ab")

    def close(self) -> None:
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.close()


class MetricsTail:
    """Reads a growing `metrics.jsonl` from where the last poll ended. The file need not exist yet. If a
    restarted trainer replaces the file by a shorter one, steps that were read before are not read again."""

    def __init__(self, path: str | Path) -> None:
        self._tail = LineTail(Path(path))
        self._last_step = 0

    def poll(self) -> list[dict[str, Any]]:
        """The lines completed since the last poll, with null as NaN. Raises `MetricsError` for a line that is
        not a JSON object."""
        new = self._tail.poll()
        first = self._tail.lines - len(new) + 1
        lines = [parse_line(line, self._tail.path, number) for number, line in enumerate(new, first)]
        fresh = [line for line in lines if line.get("step", math.inf) > self._last_step]
        self._last_step = max((line["step"] for line in fresh if "step" in line), default=self._last_step)
        return fresh


def parse_line(line: bytes, path: Path, number: int | None) -> dict[str, Any]:
    """Line `number` of the file `path` (None: its last), with null as NaN. Raises `MetricsError` if it is no
    JSON object."""
    try:
        values = msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError as error:
        which = "its last line" if number is None else f"line {number}"
        raise MetricsError(f"{path}, {which}, is not a line of metrics: {error}") from None
    if None in values.values():
        return {key: math.nan if value is None else value for key, value in values.items()}
    return values


@without_the_collector()
def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Every complete line, with null as NaN. A last line that a crash cut short is left out.

    Raises `FileNotFoundError`, and `MetricsError` for a line that is not a JSON object.
    """
    path = Path(path)
    path.stat()
    return MetricsTail(path).poll()


def last_line(path: Path) -> dict[str, Any]:
    """The last complete line, with null as NaN, found without reading a long file whole; empty where there is
    none. Raises `MetricsError` if it is not a JSON object."""
    try:
        with path.open("rb") as file:
            start = file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines = file.read().split(b"\n")[bool(start) : -1]
    except FileNotFoundError:
        return {}
    if not lines and start:  # it is longer than that
        return next(reversed(read_metrics(path)), {})
    return parse_line(lines[-1], path, None) if lines else {}


def _plain(key: str, value: Any) -> Value:
    """A value for JSON."""
    if hasattr(value, "item"):  # numpy scalars, tensors
        value = value.item()
    if isinstance(value, numbers.Integral):  # includes bool: readers need a number
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | Histogram):
        return value
    if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return list(value)
    if isinstance(value, list | tuple) and all(isinstance(v, Mapping) for v in value):
        return [{name: _plain(name, v) for name, v in each.items()} for each in value]
    raise MetricsError(f"metric `{key}` is {value!r}; it must be a number, a string or a list of strings")


def _check_line(values: Mapping[str, Value], last_step: int) -> int:
    """Check a line and return its step."""
    missing = [key for key in REQUIRED_KEYS if key not in values]
    if missing:
        raise MetricsError(f"a line of metrics lacks {', '.join(f'`{key}`' for key in missing)}")
    step = values["step"]
    if not isinstance(step, int) or step <= last_step:
        raise MetricsError(
            f"metric `step` is {step!r} after {last_step}; steps are integers that increase from 1"
        )
    generated = values["ledger/generated_groups"]
    parts = {name: values[f"ledger/{name}_groups"] for name in ("trained", "dropped", "failed", "in_flight")}
    if any(not isinstance(count, int) or count < 0 for count in (generated, *parts.values())):
        raise MetricsError(f"step {step}: the ledger has invalid counts: generated={generated}, {parts}")
    total = sum(parts.values())  # type: ignore[arg-type]  # all ints, as just checked
    if total != generated:
        terms = " + ".join(f"{count} {name}" for name, count in parts.items())
        raise InvariantError(3, f"at step {step}, {generated} generated groups, but {terms} = {total}")
    return step


def cut_after(path: Path, step: int) -> dict[str, Any] | None:
    """Keep the whole lines of a file of JSON lines that are of the steps up to `step`; returns the last of
    them."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    last, end = None, 0
    for line in content.splitlines(keepends=True):
        values = msgspec.json.decode(line, type=dict[str, Any]) if line.endswith(b"\n") else None
        if values is None or values["step"] > step:
            break
        last, end = values, end + len(line)
    if end < len(content):
        # A new file, so that readers of this one notice.
        shorter = path.with_suffix(".shorter")
        shorter.write_bytes(content[:end])
        shorter.replace(path)
    return last
