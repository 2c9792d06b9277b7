"""Records what this process does, for a trace of the run (`asyncrl.report.trace`): its states, waits, steps
and requests, each as it ends. Off unless it is `recording`.

A role writes lines of JSON into parts of a limited size. The first part and the two last ones stay, so that a
long run's beginning and end are there, and whatever was written before a process was killed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from asyncrl.states import CLOCK, State, doing

log = logging.getLogger(__name__)

RUN_BYTES = 24_000_000
"""Of all roles' parts together."""
KEPT_PARTS = 3
SHORTEST_US = 200
"""Shorter stretches are left out, but for those of `ALWAYS`."""
ALWAYS = ("swap",)

_STATES: Mapping[str, State] = {"train": "generate", "eval": "evaluate"}
"""Of a process whose engine has requests, by their purpose."""


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Something that has ended."""

    kind: str
    """`state`, `wait`, `step` or `request`."""
    name: str
    begin_us: int
    """Microseconds since the epoch."""
    for_us: int
    versions: tuple[tuple[int, int], ...] = ()
    """Of a request: how many tokens were sampled by which version, in order."""


class Recorder:
    """Writes into `folder`, going on after what an earlier process of this role has left there. An error of
    the disk ends the recording and nothing else.

    most_bytes: of its parts together.
    """

    def __init__(self, folder: Path, role: str, most_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._role = folder, role
        self._part_bytes = most_bytes // KEPT_PARTS
        self._lock = threading.Lock()
        self._offset_ns = time.time_ns() - time.monotonic_ns()
        self._number = max(part_numbers(folder, role), default=-1)
        self._next_part()

    def add(
        self, kind: str, name: str, begin_ns: int, end_ns: int, versions: tuple[tuple[int, int], ...] = ()
    ) -> None:
        """begin_ns, end_ns: by `time.monotonic_ns`."""
        for_us = (end_ns - begin_ns) // 1000
        if for_us < SHORTEST_US and name not in ALWAYS:
            return
        line = msgspec.json.encode(Span(kind, name, (begin_ns + self._offset_ns) // 1000, for_us, versions))
        with self._lock:
            if self._file is None:
                return
            try:
                if self._written + len(line) > self._part_bytes:
                    self._next_part()
                # Unbuffered: what a killed process did last is what somebody will want to see.
                self._written += self._file.write(line + b"\n")
            except OSError as error:
                log.warning("the trace ends here: %s", error)
                self._file = None

    def state(self, state: State, begin_ns: int, end_ns: int) -> None:
        self.add("state", state, begin_ns, end_ns)

    def _next_part(self) -> None:
        self._number += 1
        path = part(self._folder, self._role, self._number)
        self._file = path.open("ab", buffering=0)
        self._written = 0
        forget_parts(self._folder, self._role, self._number)


def part(folder: Path, role: str, number: int) -> Path:
    return folder / f"{role}.{number}.jsonl"


def part_numbers(folder: Path, role: str) -> list[int]:
    """Of the parts that are there, in order."""
    return sorted(int(path.name.split(".")[-2]) for path in folder.glob(f"{role}.*.jsonl"))


def forget_parts(folder: Path, role: str, newest: int) -> None:
    """Those between the first and the last."""
    for number in part_numbers(folder, role):
        if 0 < number <= newest - KEPT_PARTS + 1:
            part(folder, role, number).unlink(missing_ok=True)


_recorder: Recorder | None = None


@contextmanager
def recording(folder: Path | None, role: str, most_bytes: int = RUN_BYTES) -> Iterator[None]:
    """Record while the body runs; None: record nothing."""
    global _recorder
    if folder is not None:
        _recorder = Recorder(folder, role, most_bytes)
        CLOCK.listener = _recorder.state
    try:
        yield
    finally:
        CLOCK.seconds()  # ends the present stretch
        _recorder = CLOCK.listener = None


def ended(kind: str, name: str, for_s: float) -> None:
    """Something ends now that has taken so long."""
    if _recorder is not None:
        now_ns = time.monotonic_ns()
        _recorder.add(kind, name, now_ns - round(for_s * 1e9), now_ns)


class _VersionSpan(Protocol):
    @property
    def length(self) -> int: ...
    @property
    def version(self) -> int: ...


class _Chunk(Protocol):
    @property
    def versions(self) -> tuple[_VersionSpan, ...]: ...


@contextmanager
def in_engine(request: str, purpose: str, chunks: Sequence[_Chunk]) -> Iterator[None]:
    """While the body runs, the engine has this request. chunks: what it has given, at the end of the body."""
    begin_ns = time.monotonic_ns()
    with doing(_STATES[purpose]):
        try:
            yield
        finally:
            if _recorder is not None:
                versions = tuple((span.length, span.version) for chunk in chunks for span in chunk.versions)
                _recorder.add("request", request, begin_ns, time.monotonic_ns(), versions)
