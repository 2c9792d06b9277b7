"""Brings what a run writes to a tracker: while it goes on, or later."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec

from asyncrl.observe.histogram import histograms
from asyncrl.observe.metrics import FILE_NAME, parse_line
from asyncrl.observe.samples import FILE_NAME as SAMPLES
from asyncrl.observe.samples import Sample
from asyncrl.observe.tail import LineTail
from asyncrl.observe.trackers.base import Step, Tracker
from asyncrl.paths import replace_file

FOLDER = ".trackers"
"""In a run directory: what each tracker has."""
MOST_BYTES = 4 << 20
"""Of metrics that are read at a time."""


class Following:
    """What is to come is in the run's files, so nothing is lost and nobody waits, however slow the tracker
    is.

    marks: a file of what the tracker has, kept from one process to the next: a checksum of each line of
    `metrics.jsonl`, in order. Lines that differ from it are those that the run has written anew, after it
    went on from a checkpoint.
    """

    def __init__(self, run_dir: Path, marks: Path, tracker: Tracker) -> None:
        self._tracker = tracker
        self._metrics = LineTail(run_dir / FILE_NAME)
        self._samples = LineTail(run_dir / SAMPLES)
        self._pending: dict[int, list[Sample]] = defaultdict(list)
        """Samples of steps that are not written yet."""
        self._marks = marks
        self._has = array("I")
        with suppress(FileNotFoundError):
            content = marks.read_bytes()
            self._has.frombytes(content[: len(content) // self._has.itemsize * self._has.itemsize])
        self._last_step = 0
        """Of the lines that were read."""
        self._has_begun = False

    def poll(self) -> bool:
        """Write the steps that are new. Returns whether there may be more at once."""
        lines = self._metrics.poll(MOST_BYTES)
        if not lines:
            return False
        self._read_samples()  # after the metrics: a step's samples are there before its line
        first = self._metrics.lines - len(lines)
        marks = [crc32(line) for line in lines]
        known = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(marks, self._has[first:], strict=False))
        )
        if first + known == 0:
            self._last_step = 0
        elif known:
            self._last_step = parse_line(lines[known - 1], self._metrics.path, first + known)["step"]
        if known < len(lines):
            # A line is a step.
            repeated = len(self._has) - first - known
            del self._has[first + known :]
            if repeated or not self._has_begun:
                self._has_begun = True
                self._tracker.begin(self._last_step, self._last_step + repeated)
            self._tracker.write(
                [self._step(line, number) for number, line in enumerate(lines[known:], first + known + 1)]
            )
            self._has.extend(marks[known:])
            replace_file(self._marks, self._has.tobytes())
        for step in [step for step in self._pending if step <= self._last_step]:
            del self._pending[step]
        return True

    def _step(self, line: bytes, number: int) -> Step:
        values = parse_line(line, self._metrics.path, number)
        self._last_step = values["step"]
        numbers = _numbers(values)
        del numbers["step"]
        return Step(
            values["step"],
            numbers,
            dict(histograms(values)),
            self._pending[values["step"]],
            values.get("warnings", ()),
            [_numbers(each) for each in values.get("earlier_rounds", ())],
        )

    def _read_samples(self) -> None:
        lines = self._samples.poll()
        if len(lines) == self._samples.lines:  # all of another file
            self._pending.clear()
        for line in lines:
            with suppress(msgspec.DecodeError):
                sample = msgspec.json.decode(line, type=Sample)
                self._pending[sample.step].append(sample)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite ones."""
    return {key: v for key, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
