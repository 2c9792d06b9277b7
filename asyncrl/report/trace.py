"""A run's trace in Chrome's format, which https://ui.perfetto.dev opens: merged from what each role has
recorded (`asyncrl.trace`), of a run that has ended, goes on or was killed."""

from __future__ import annotations

import gzip
import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from asyncrl.config import load
from asyncrl.errors import ConfigError
from asyncrl.paths import replace_file, user_path
from asyncrl.runfiles.layout import RunDir
from asyncrl.trace import Span, part, part_numbers

ROWS = {"state": "states", "step": "steps"}
"""Rows of what comes one after the other, by the kind of span."""
NUMBERED_ROWS = {"request": ("slot", 1_000), "wait": ("waits", 1_000_000)}
"""What overlaps has several rows: their name, and the first one's number in the trace."""
LEFT_OUT = "not recorded: the parts in between are not kept"

Event = dict[str, Any]


def write_trace(run_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write the trace of a run, by default to `trace.json.gz` in its directory, and return its path. Raises
    `ConfigError` for a folder without recordings, and where the file cannot be written."""
    run = RunDir(user_path(run_dir, f"{run_dir}"))
    roles = sorted({file.name.rsplit(".", 2)[0] for file in run.spans.glob("*.jsonl")})
    if not roles:
        raise ConfigError(f"{run_dir}: nothing was recorded here; run with observe.trace=true")
    slots = _slots(run)
    found = [
        event for pid, role in enumerate(roles, 1) for event in events(pid, role, read(run, role), slots)
    ]
    path = Path(path) if path else run.trace
    content = msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": found})
    try:
        replace_file(path, gzip.compress(content, compresslevel=6) if path.suffix == ".gz" else content)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written ({error.strerror}); name another file") from None
    return path


def read(run: RunDir, role: str) -> list[Span]:
    """What a role has recorded; a line that a crash cut short is left out, and so are parts that were removed
    meanwhile."""
    decoder, found = msgspec.json.Decoder(Span), list[Span]()
    numbers = part_numbers(run.spans, role)
    for before, number in pairwise([-1, *numbers]):
        lines = part(run.spans, role, number).read_bytes().splitlines()
        spans = list(_decoded(decoder, lines))
        if number > before + 1 and found and spans:
            end_us = max(span.begin_us + span.for_us for span in found)
            begin_us = min(span.begin_us for span in spans)
            found.append(Span("state", LEFT_OUT, end_us, max(0, begin_us - end_us)))
        found += spans
    return found


def events(pid: int, role: str, spans: Iterable[Span], slots: float = math.inf) -> Iterator[Event]:
    """In Chrome's format, of one role: pid names it in the trace. slots: requests that its engine computes at
    a time; it begins the others in the order in which they came."""
    by_kind: dict[str, list[Span]] = {}
    for span in spans:
        by_kind.setdefault(span.kind, []).append(span)
    yield _named("process_name", pid, 0, role)
    for tid, (kind, name) in enumerate(ROWS.items(), 1):
        if kind in by_kind:
            yield _named("thread_name", pid, tid, name)
        for span, _, begin_us in in_rows(by_kind.get(kind, []), 1):  # Perfetto drops what overlaps
            yield _complete(pid, tid, span.name, begin_us, span.begin_us + span.for_us - begin_us)
    for kind, (name, first) in NUMBERED_ROWS.items():
        placed = list(in_rows(by_kind.get(kind, []), slots if kind == "request" else math.inf))
        for row in sorted({row for _, row, _ in placed}):
            yield _named("thread_name", pid, first + row, f"{name} {row}")
        for span, row, begin_us in placed:
            if kind == "request":
                yield from _request(pid, first + row, span, begin_us)
            else:
                yield _complete(pid, first + row, span.name, span.begin_us, span.for_us)


def in_rows(spans: Sequence[Span], most: float = math.inf) -> Iterator[tuple[Span, int, int]]:
    """Each with the first row that is free for it, and when it gets that, in microseconds: at its begin, or
    where all rows are taken, when one becomes free. One that ends before that is left out."""
    free: list[int] = []
    taken: list[tuple[int, int]] = []  # until when, and which
    rows, begin_us = 0, 0
    for span in sorted(spans, key=lambda span: span.begin_us):
        begin_us, end_us = max(begin_us, span.begin_us), span.begin_us + span.for_us
        while taken and (taken[0][0] <= begin_us or (not free and rows >= most)):
            until_us, row = heapq.heappop(taken)
            heapq.heappush(free, row)
            begin_us = max(begin_us, until_us)
        if not free:
            heapq.heappush(free, rows)
            rows += 1
        row = heapq.heappop(free)
        heapq.heappush(taken, (max(begin_us, end_us), row))
        if end_us > begin_us:
            yield span, row, begin_us


def _request(pid: int, tid: int, span: Span, begin_us: int) -> Iterator[Event]:
    """A stretch for each version, as long as its share of the tokens: they come one after the other."""
    total = sum(tokens for tokens, _ in span.versions)
    for_us, done = span.begin_us + span.for_us - begin_us, 0
    about = {"request": span.name, "tokens": total, "waited_us": begin_us - span.begin_us}
    if not total:
        yield _complete(pid, tid, "no token", begin_us, for_us) | {"args": about}
    for tokens, version in span.versions:
        at_us, end_us = (begin_us + for_us * n // total for n in (done, done + tokens))
        yield _complete(pid, tid, f"version {version}", at_us, end_us - at_us) | {"args": about}
        done += tokens


def _complete(pid: int, tid: int, name: str, begin_us: int, for_us: int) -> Event:
    return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": begin_us, "dur": for_us}


def _named(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "pid": pid, "tid": tid, "name": what, "args": {"name": name}}


def _decoded(decoder: msgspec.json.Decoder[Span], lines: Iterable[bytes]) -> Iterator[Span]:
    for line in lines:
        try:
            yield decoder.decode(line)
        except msgspec.DecodeError:
            continue


def _slots(run: RunDir) -> float:
    try:
        return load(run.config).rollout.slots
    except (ConfigError, OSError):
        return math.inf
