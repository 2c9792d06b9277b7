"""What processes record, and the trace that it becomes."""

import gzip
import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.cli.main import main
from asyncrl.core.records import VersionSpan
from asyncrl.report.trace import LEFT_OUT, events, in_rows, write_trace
from asyncrl.runfiles.layout import RunDir
from asyncrl.states import CLOCK, doing
from asyncrl.trace import Recorder, Span, ended, in_engine, recording
from asyncrl.waits import waiting

S = 10**9


class Chunk:
    versions = (VersionSpan(0, 3, 7), VersionSpan(3, 1, 8))


def complete(found, **wanted):
    return [e for e in found if e["ph"] == "X" and all(e[key] == value for key, value in wanted.items())]


def test_what_a_process_does_becomes_rows_of_a_trace(make_run, capsys):
    run, began_ns = RunDir(make_run()), time.monotonic_ns()
    with recording(run.spans, "rollout-0"):
        with waiting("groups", state="wait_work"):
            time.sleep(0.002)
        with in_engine("5/0", "train", [Chunk()]), doing("swap"):
            time.sleep(0.002)
        ended("step", "step 1", 0.5)
    took_us = (time.monotonic_ns() - began_ns) / 1000
    assert CLOCK.listener is None
    with doing("swap"):  # nobody records any more
        ended("step", "step 2", 0.5)
    assert main(["trace", str(run.path)]) == 0
    assert capsys.readouterr().out.strip() == str(run.trace)
    found = json.loads(gzip.decompress(run.trace.read_bytes()))["traceEvents"]
    rows = {(e["tid"], e["args"]["name"]) for e in found if e["ph"] == "M"}
    assert {name for _, name in rows} == {"rollout-0", "states", "steps", "slot 0", "waits 0"}
    (work,), (groups,) = complete(found, name="wait_work"), complete(found, name="groups")
    assert 1900 < work["dur"] < took_us and 1900 < groups["dur"] < took_us  # by two clocks
    assert work["ts"] / 1e6 == pytest.approx(time.time(), abs=600)
    assert len(complete(found, name="swap")) == 1
    (step,) = complete(found, name="step 1")
    assert step["dur"] == 500_000
    old, new = (complete(found, name=f"version {v}")[0] for v in (7, 8))
    assert (old["tid"], old["ts"] + old["dur"]) == (new["tid"], new["ts"])
    assert old["dur"] == pytest.approx(3 * new["dur"], abs=4)  # three of four tokens
    assert old["args"] | {"waited_us": 0} == {"request": "5/0", "tokens": 4, "waited_us": 0}


def test_the_beginning_and_the_end_stay_and_the_size_is_bounded(make_run):
    run, most = RunDir(make_run()), 9000
    first = Recorder(run.spans, "rollout-0", most)
    for i in range(300):
        first.add("state", f"s{i}", i * S, (i + 1) * S)
    second = Recorder(run.spans, "rollout-0", most)  # the process was killed, and started again
    second.add("state", "again", 300 * S, 301 * S)
    with next(run.spans.glob("rollout-0.0.jsonl")).open("ab") as file:
        file.write(b'["state","cut sh')
    assert sum(path.stat().st_size for path in run.spans.iterdir()) <= most + 100
    found = json.loads(write_trace(run.path, run.path / "t.json").read_bytes())["traceEvents"]
    states = [e["name"] for e in complete(found, pid=1)]
    assert states[0] == "s0"
    assert states[-2:] == ["s299", "again"]
    gap = states.index(LEFT_OUT)
    before, (left_out,) = int(states[gap - 1][1:]), complete(found, name=LEFT_OUT)
    after = int(states[gap + 1][1:])
    assert left_out["dur"] == (after - before - 1) * 1_000_000


def test_short_stretches_are_left_out_but_for_swaps(make_run):
    run = RunDir(make_run())
    recorder = Recorder(run.spans, "rollout-0", 9000)
    recorder.add("state", "prefill", 0, 100_000)
    recorder.add("state", "swap", 0, 10_000)
    assert [line.split(b",")[1] for path in run.spans.iterdir() for line in path.read_bytes().split()] == [
        b'"swap"'
    ]


def test_a_full_disk_ends_the_recording_and_nothing_else(make_run, caplog):
    recorder = Recorder(RunDir(make_run()).spans, "rollout-0", 9000)
    recorder._file.close()
    recorder._file = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115
    for _ in range(2):
        recorder.add("state", "generate", 0, S)
    assert caplog.text.count("the trace ends here") == 1


def test_a_run_that_recorded_nothing_says_how(make_run, capsys):
    assert main(["trace", str(make_run())]) == 2
    assert "run with observe.trace=true" in capsys.readouterr().err


spans = st.lists(
    st.builds(Span, st.just("request"), st.text(max_size=2), st.integers(0, 50), st.integers(0, 20)),
    max_size=30,
)


@given(spans, st.integers(1, 4))
def test_rows_hold_one_at_a_time_and_no_more_than_there_are(requests, most):
    placed = list(in_rows(requests, most))
    by_row = {}
    for span, row, begin_us in placed:
        assert span.begin_us <= begin_us < span.begin_us + span.for_us
        by_row.setdefault(row, []).append((begin_us, span.begin_us + span.for_us))
    assert all(row < most for row in by_row)
    for held in by_row.values():
        assert all(end <= begin for (_, end), (begin, _) in pairwise(sorted(held)))


def test_a_request_waits_until_another_ends_its_slot():
    spans = [Span("request", "a", 0, 10, ((2, 0),)), Span("request", "b", 3, 17, ((4, 1),))]
    one = complete(events(1, "rollout-0", spans, slots=1))
    assert [(e["name"], e["ts"], e["dur"], e["args"]["waited_us"]) for e in one] == [
        ("version 0", 0, 10, 0),
        ("version 1", 10, 10, 7),
    ]
    assert len({e["tid"] for e in complete(events(1, "rollout-0", spans, slots=2))}) == 2


def test_what_follows_begins_when_the_one_before_has_ended():
    spans = [Span("step", "step 1", 0, 10), Span("step", "step 2", 8, 12)]  # timed by two looks at the clock
    found = complete(events(1, "trainer-0", spans))
    assert [(e["name"], e["ts"], e["dur"]) for e in found] == [("step 1", 0, 10), ("step 2", 10, 10)]
