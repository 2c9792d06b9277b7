"""What trackers get of a run: real TensorBoard, W&B (offline) and trackio (local), and trackers that fail."""

import asyncio
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from itertools import chain

import psutil
import pytest
from launched import command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_START_INFO_TAG, parse_session_start_info_plugin_data

from asyncrl.cli.main import main
from asyncrl.config import load
from asyncrl.errors import ConfigError
from asyncrl.observe.histogram import Histogram, histograms
from asyncrl.observe.metric_table import REQUIRED_KEYS
from asyncrl.observe.metrics import MetricsWriter
from asyncrl.observe.trackers import follow, start
from asyncrl.observe.trackers.follow import Following
from asyncrl.observe.trackers.start import marks_of, tracked, tracked_run
from asyncrl.observe.trackers.tensorboard import TensorBoard

SAMPLE = {"step": 1, "chosen": ["best"], "group": 1, "row": 2, "reward": 0.5, "parts": {"right": 0.5}}
SAMPLE |= {"tokens": 3, "finish": "stop", "versions": [0, 1], "prompt": "two?", "response": "# 2\nyes"}
CONFIG = """
run: {steps: 40}
model: {path: m}
data: {path: d.jsonl}
reward: {functions: [{function: asyncrl.tiny.skill:exact_match}]}
"""


class Log:
    """A tracker that remembers."""

    def __init__(self):
        self.calls = []

    def begin(self, after_step, last_step):
        self.calls.append((after_step, last_step))

    def write(self, steps):
        self.calls.append([step.step for step in steps])

    def close(self):
        pass


@pytest.fixture
def run(tmp_path):
    return tracked_run(tmp_path, "tests", {"trainer.lr": 1e-3, "run.steps": 4, "data.mix": [1]})


def write(folder, lines, after_step=0):
    with MetricsWriter(folder, after_step) as writer:
        for line in lines:
            writer.write(line)


def followed(run, tracker, name="tensorboard"):
    following = Following(run.folder, marks_of(run.folder, name), tracker)
    while following.poll():
        pass
    return tracker


def board(folder):
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"histograms": 0}).Reload()


def test_tensorboard_has_numbers_histograms_texts_and_settings(run, make_line, tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    rewards = Histogram.of([0.0, 0.5, 0.5, 1.0])
    changes = {"ess": float("nan"), "note": "text", "reward/histogram": rewards, "warnings": ["too hot"]}
    ages = {"age/0/tokens": 30.0, "age/2/tokens": 10.0}
    scored = {"eval/version": 1, "eval/math/reward/mean": 0.25}
    write(tmp_path, [make_line(1) | changes | ages, make_line(2) | changes | ages | scored])
    followed(run, TensorBoard(run)).close()
    found = board(tmp_path)
    shown = {tag for tag in found.Tags()["scalars"] if not tag.startswith(("0_overview/", "z_age/", "eval/"))}
    assert [(e.step, e.value) for e in found.Scalars("eval/math/reward/mean")] == [(1, 0.25)]
    assert shown == set(REQUIRED_KEYS) - {"step", "ess"}
    assert [(e.step, e.value) for e in found.Scalars("staleness/mean")] == [(1, 1.25), (2, 1.25)]
    assert set(found.Tags()["histograms"]) == {"histograms/reward", "histograms/token_age"}
    of_age = found.Histograms("histograms/token_age")[0].histogram_value
    assert (of_age.num, of_age.bucket_limit, of_age.bucket) == (40.0, [-0.5, 0.5, 1.5, 2.5], [0, 30, 0, 10])
    (text,) = found.Tensors("samples/best")
    assert b"    # 2\n    yes" in text.tensor_proto.string_val[0]
    assert b"reward 0.5, right 0.5" in text.tensor_proto.string_val[0]
    assert len(found.Tensors("warnings")) == 2
    info = parse_session_start_info_plugin_data(
        found.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    )
    assert info.hparams["trainer.lr"].number_value == 1e-3
    assert info.hparams["data.mix"].string_value == "[1]"


def test_a_run_that_went_back_has_each_step_once_as_it_was_at_last(run, make_line, tmp_path):
    write(tmp_path, [make_line(step, reward__mean=0.25) for step in range(1, 8)])
    followed(run, TensorBoard(run)).close()
    write(tmp_path, [make_line(step, reward__mean=0.75) for step in range(5, 10)], after_step=4)
    followed(run, TensorBoard(run)).close()
    points = [(e.step, e.value) for e in board(tmp_path).Scalars("reward/mean")]
    assert points == [(step, 0.25 if step <= 4 else 0.75) for step in range(1, 10)]


def test_the_first_step_is_there_once_when_more_becomes_known_of_it(run, make_line, tmp_path):
    (tmp_path / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    tracker = TensorBoard(run)
    following = Following(tmp_path, marks_of(tmp_path, "tensorboard"), tracker)
    with MetricsWriter(tmp_path) as writer:
        writer.write(make_line(1))
        assert following.poll()
        earlier = [{"eval/version": 0, "eval/math/reward/mean": 0.125}]
        writer.amend({"eval/version": 1, "eval/math/reward/mean": 0.25, "earlier_rounds": earlier})
        assert following.poll()
    tracker.close()
    found = board(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("eval/math/reward/mean")] == [(0, 0.125), (1, 0.25)]
    assert len(found.Scalars("staleness/mean")) == 1
    (text,) = found.Tensors("samples/best")
    assert b"yes" in text.tensor_proto.string_val[0]


def test_what_a_tracker_has_is_not_brought_again(run, make_line, tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "MOST_BYTES", 1000)  # about two lines
    write(tmp_path, map(make_line, range(1, 6)))
    log = Log()
    following = Following(tmp_path, marks_of(tmp_path, "log"), log)
    while following.poll():
        pass
    assert log.calls[0] == (0, 0)
    assert [*chain(*log.calls[1:])] == [1, 2, 3, 4, 5]
    write(tmp_path, map(make_line, (4, 5)), after_step=3)  # the same again, bit by bit
    write(tmp_path, [make_line(5, loss=9.0), make_line(6)], after_step=4)
    log.calls.clear()
    while following.poll():
        pass
    assert log.calls[0] == (4, 5)
    assert [*chain(*log.calls[1:])] == [5, 6]
    write(tmp_path, [make_line(7)], after_step=6)
    assert followed(run, Log(), "log").calls == [(6, 6), [7]]  # in another process


def test_histograms_of_ratios_lie_between_their_quantiles():
    ratios = {"ratio/p01": 0.5, "ratio/p50": 1.0, "ratio/p75": 1.0, "ratio/p99": 2.0, "ratio/max": 3.0}
    (name, found), *rest = histograms(ratios | {"trained_tokens": 100.0})
    assert (name, rest) == ("ratio", [])
    assert found.edges == (0.5, 1.0, 2.0, 3.0)
    assert found.counts == pytest.approx((50, 49, 1))


OWN = """
    import os, signal, time
    from pathlib import Path

    class Base:
        def __init__(self, run): self.file = Path(run.path) / "own.txt"
        def begin(self, after_step, last_step): pass
        def write(self, steps):
            with self.file.open("a") as file: file.write("".join(f"{step.step} " for step in steps))
        def close(self): pass
    class Good(Base):
        pass
    class Failing(Base):
        def write(self, steps): raise OSError("no\\nroute")
    class Asked(Base):
        def write(self, steps):
            os.kill(os.getpid(), signal.SIGTERM)
            super().write(steps)
    class Deadly(Base):
        def write(self, steps): os.kill(os.getpid(), signal.SIGKILL)
    class Hanging(Base):
        def close(self):
            self.file.with_name("closing").touch()
            time.sleep(600)
"""


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Good", None),
        ("Asked", None),  # as a cluster asks all processes of a job, of which the run is one
        ("Failing", "OSError: no route"),
        ("Deadly", "status -9"),
        ("Hanging", "it was not done"),
    ],
)
def test_a_run_neither_waits_for_a_tracker_nor_dies_with_it(
    name, told, run, make_line, tmp_path, monkeypatch
):
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN))
    monkeypatch.setattr(start, "END_S", 0.1 if name == "Hanging" else 60.0)
    monkeypatch.setattr(start, "TOLD_S", 0.0 if name == "Hanging" else 60.0)
    messages = []

    async def go_on():
        async with tracked({"own": f"{tmp_path / 'own.py'}:{name}"}, tmp_path, lambda: run, messages.append):
            write(tmp_path, map(make_line, (1, 2)))

    asyncio.run(go_on())
    if told is None:
        assert messages == []
        assert (tmp_path / "own.txt").read_text() == "1 2 "
    else:
        *before, message = messages
        assert [text.partition("; ")[2] for text in before] == (
            ["own may take 0 s to write the rest"] if name == "Hanging" else []
        )
        assert told in message
        assert f"asyncrl track {tmp_path} --to own" in message


def once_all_is_brought(folder, act):
    """And is waited for. In a thread, which ends with the test's process if it waits in vain."""

    def look():
        while not (folder / "closing").exists():
            time.sleep(0.01)
        act()

    threading.Thread(target=look, daemon=True).start()


def test_whoever_waits_for_a_tracker_gives_it_up_once_it_stands_still(
    make_line, tmp_path, monkeypatch, capsys
):
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN))
    folder = finished_run(tmp_path, make_line)
    once_all_is_brought(tmp_path, lambda: monkeypatch.setattr(start, "STILL_S", 1.0))
    assert main(["track", str(folder), "--to", f"{tmp_path / 'own.py'}:Hanging"]) == 1
    assert "it has brought nothing for 1 s, and was ended" in capsys.readouterr().err
    assert (tmp_path / "own.txt").read_text() == "1 2 "


def test_a_full_disk_leaves_no_run_without_an_id(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            tracked_run(tmp_path, "tests", {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    first = tracked_run(tmp_path, "tests", {})
    assert len(first.id) == 8
    assert tracked_run(tmp_path, "tests", {}) == first


def test_who_is_interrupted_bringing_a_run_to_a_tracker_leaves_nothing_running(make_line, tmp_path, capsys):
    (tmp_path / "own.py").write_text(textwrap.dedent(OWN))
    folder = finished_run(tmp_path, make_line)
    once_all_is_brought(tmp_path, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert main(["track", str(folder), "--to", f"{tmp_path / 'own.py'}:Hanging"]) == 130
    assert [child for child in psutil.Process().children() if start.__package__ in command(child)] == []


def test_a_name_that_is_none_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG + "observe: {trackers: [tensorbord]}\n")
    with pytest.raises(ConfigError, match=r"observe\.trackers.*did you mean `tensorboard`"):
        load(tmp_path / "c.yaml")


def finished_run(tmp_path, make_line):
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "samples.jsonl").write_text(json.dumps(SAMPLE) + "\n")
    rewards = {"reward/histogram": Histogram.of([0.0, 1.0])}
    late = [{"eval/version": version, "eval/math/reward/mean": version / 4} for version in (0, 1, 2)]
    ends = {1: {}, 2: late[2] | {"earlier_rounds": late[:2]}}
    write(tmp_path, [make_line(step) | rewards | {"warnings": ["hot"]} | ends[step] for step in (1, 2)])
    return tmp_path


LATE_ROUNDS = (["eval/math/reward/mean", "eval/version"], [[0.0, 0], [0.25, 1], [0.5, 2]])
"""Of `finished_run`: columns and rows."""


@pytest.mark.slow
def test_wandb_offline(tmp_path, make_line, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = finished_run(tmp_path, make_line)
    assert main(["track", str(folder), "--to", "wandb"]) == 0
    write(folder, [make_line(3)], after_step=2)
    assert main(["track", str(folder), "--to", "wandb"]) == 0
    identity = (folder / ".trackers" / "id").read_text()
    first, second = sorted(folder.glob(f"wandb/offline-run-*-{identity}*/run-*.wandb"))
    assert [step for step, _ in wandb_rows(first)] == [1, 2]
    assert [(step, row["reward/mean"]) for step, row in wandb_rows(second)] == [
        (3, make_line(3)["reward/mean"])
    ]
    _, row = wandb_rows(first)[0]
    assert row["histograms/reward._type"] == "histogram"
    assert row["samples._type"] == "table-file"
    _, row = wandb_rows(first)[1]
    [file] = first.parent.glob(f"files/{row['late_rounds.path']}")
    told = json.loads(file.read_text())
    assert (told["columns"], told["data"]) == LATE_ROUNDS


def wandb_rows(path):
    """(step, row) of each record of a history."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for data in wandb_records(path.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            rows.append((record.history.step.num, row))
    return rows


def wandb_records(content, header=7, block=32768):
    """Of a file in the form of LevelDB's log."""
    at, parts = header, b""
    while at < len(content):
        if (left := block - at % block) < header:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)
        parts += content[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_trackio_in_a_local_folder(tmp_path, make_line, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = finished_run(tmp_path, make_line)
    for lines, after in (([], 2), ([make_line(3)], 2)):
        write(folder, lines, after_step=after)
        assert main(["track", str(folder), "--to", "trackio"]) == 0
    code = (
        "import sys, json; from trackio.sqlite_storage import SQLiteStorage as S;"
        "print(json.dumps({run: S.get_logs('asyncrl', run) for run in S.get_runs('asyncrl')}, default=str))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240
    )
    ((name, rows),) = json.loads(done.stdout.splitlines()[-1]).items()
    assert name == f"{folder.name}-{(folder / '.trackers' / 'id').read_text()}"
    assert [(row["step"], row["reward/mean"]) for row in rows] == [
        (step, make_line(step)["reward/mean"]) for step in (1, 2, 3)
    ]
    columns, values = LATE_ROUNDS
    assert rows[1]["late_rounds"]["_value"] == [dict(zip(columns, row, strict=True)) for row in values]
