import io
import json
import math
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from asyncrl.core.invariants import InvariantError
from asyncrl.observe import metrics
from asyncrl.observe.metric_table import REQUIRED_KEYS
from asyncrl.observe.metrics import MetricsError, MetricsTail, MetricsWriter, last_line, read_metrics


def test_lines_come_back_as_written(tmp_path, make_line):
    with MetricsWriter(tmp_path) as writer:
        writer.write(make_line(1))
        writer.write(make_line(2, warnings=["a", "b"], note="x"))
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        make_line(1),
        make_line(2, warnings=["a", "b"], note="x"),
    ]


def test_each_line_is_readable_as_soon_as_it_is_written(tmp_path, make_line):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(make_line(step))
            assert len(read_metrics(tmp_path / "metrics.jsonl")) == step


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_for_readers(tmp_path, make_line):
    with MetricsWriter(tmp_path) as writer:
        writer.write(make_line(1, ess=float("nan"), entropy=np.float32("inf"), clip_frac=None))
    text = (tmp_path / "metrics.jsonl").read_text()
    raw = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert raw["ess"] is None and raw["entropy"] is None and raw["clip_frac"] is None
    [line] = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(line["ess"]) and math.isnan(line["entropy"]) and math.isnan(line["clip_frac"])


def test_numpy_and_torch_numbers_are_numbers(tmp_path, make_line):
    with MetricsWriter(tmp_path) as writer:
        writer.write(
            make_line(np.int64(1), ess=np.float64(0.5), entropy=torch.tensor(1.5), version=torch.tensor(7))
        )
    [line] = read_metrics(tmp_path / "metrics.jsonl")
    assert (line["step"], line["ess"], line["entropy"], line["version"]) == (1, 0.5, 1.5, 7)


@pytest.mark.parametrize("value", [object(), {"a": 1}, [1, 2], b"x"])
def test_other_values_are_refused_by_name(tmp_path, make_line, value):
    with MetricsWriter(tmp_path) as writer, pytest.raises(MetricsError, match=r"`loss/extra` is .*number"):
        writer.write(make_line(1) | {"loss/extra": value})


@pytest.mark.parametrize("key", REQUIRED_KEYS)
def test_a_missing_key_is_named_and_nothing_is_written(tmp_path, make_line, key):
    line = make_line(1)
    del line[key]
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(MetricsError, match=f"lacks `{key}`$"):
            writer.write(line)
        assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("step", [0, 4, 5, 5.5, None])
def test_steps_rise_from_one(tmp_path, make_line, step):
    with MetricsWriter(tmp_path) as writer:
        writer.write(make_line(5))
        with pytest.raises(MetricsError, match=f"`step` is {step} after 5"):
            writer.write(make_line(1) | {"step": step})


@pytest.mark.parametrize("part", ["generated", "trained", "dropped", "failed", "in_flight"])
def test_a_ledger_that_does_not_close_stops_the_run(tmp_path, make_line, part):
    line = make_line(1)
    line[f"ledger/{part}_groups"] += 1
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(
            InvariantError, match=r"invariant 3 .*step 1, 5[67] generated groups, but"
        ) as info:
            writer.write(line)
        assert info.value.number == 3
        assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("count", [1.5, -1, None, "3"])
def test_the_ledgers_counts_are_counts(tmp_path, make_line, count):
    with MetricsWriter(tmp_path) as writer, pytest.raises(MetricsError, match="invalid counts"):
        writer.write(make_line(1) | {"ledger/failed_groups": count})


def test_a_line_cut_short_is_not_read_and_is_removed_on_reopening(tmp_path, make_line):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path) as writer:
        writer.write(make_line(1))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 2])
    assert read_metrics(path) == [make_line(1)]
    with MetricsWriter(tmp_path, after_step=1) as writer:
        assert path.read_bytes() == whole
        writer.write(make_line(2))
    assert read_metrics(path) == [make_line(1), make_line(2)]


def test_a_file_that_holds_only_half_a_line_is_emptied(tmp_path, make_line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1')
    assert read_metrics(path) == []
    MetricsWriter(tmp_path).close()
    assert path.read_bytes() == b""


def test_a_broken_line_in_the_middle_is_reported_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 2, is not a line of metrics"):
        read_metrics(path)


def test_no_file_is_an_error_for_a_reader_and_nothing_yet_for_a_tail(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "metrics.jsonl")
    assert MetricsTail(tmp_path / "metrics.jsonl").poll() == []


def test_a_tail_gives_each_line_once_whatever_the_pieces_it_arrives_in(tmp_path, make_line):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    content = b"".join(json.dumps(make_line(step)).encode() + b"\n" for step in range(1, 6))
    seen = []
    with path.open("ab", buffering=0) as file:
        for start in range(0, len(content), 97):
            file.write(content[start : start + 97])
            seen += [line["step"] for line in tail.poll()]
            assert tail.poll() == []
    assert seen == [1, 2, 3, 4, 5]


class GrowsWhileRead(io.FileIO):
    """A file to which the rest of a line is added as a reader has come to its end."""

    rest = b""

    def readinto(self, buffer):
        got = super().readinto(buffer)
        if got == 0 and self.rest:
            rest, self.rest = self.rest, b""
            with io.FileIO(self.name, "ab") as file:
                file.write(rest)
        return got


def test_a_tail_leaves_a_line_that_grows_while_it_is_read_for_the_next_poll(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step')
    growing = GrowsWhileRead(path)
    growing.rest = b'": 2}\n{"step": 3}\n'
    tail = MetricsTail(path)
    with monkeypatch.context() as at_once:
        at_once.setattr(Path, "open", lambda *_: io.BufferedReader(growing))
        assert tail.poll() == [{"step": 1}]
    assert growing.rest == b""
    assert tail.poll() == [{"step": 2}, {"step": 3}]


def test_a_tail_counts_lines_across_polls(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    path.write_text("{}\n{}\n")
    assert tail.poll() == [{}, {}]
    with path.open("a") as file:
        file.write("{}\n[]\n")
    with pytest.raises(MetricsError, match="line 4"):
        tail.poll()


def test_killing_the_writer_loses_no_line(tmp_path, make_line):
    code = textwrap.dedent("""
        import json, os, signal, sys
        from asyncrl.observe.metrics import MetricsWriter
        writer = MetricsWriter(sys.argv[1])
        for line in sys.stdin:
            writer.write(json.loads(line))
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    lines = [make_line(step) for step in range(1, 20)]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        input="\n".join(map(json.dumps, lines)),
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


def test_readers_need_no_torch():
    code = "import asyncrl.observe.metrics, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_run_that_goes_on_from_an_earlier_step_writes_its_later_lines_anew(tmp_path, make_line):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(make_line(step) | {"wall_s": 10.0 * step})
    tail = MetricsTail(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in tail.poll()] == [1, 2, 3]
    with MetricsWriter(tmp_path, after_step=2) as writer:
        assert tail.poll() == []
        assert writer.last_wall_s == 20.0
        assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
        writer.write(make_line(3) | {"wall_s": 25.0})
        writer.write(make_line(4) | {"wall_s": 26.0})
    assert [line["step"] for line in tail.poll()] == [4]
    assert [line["wall_s"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [
        *(10.0, 20.0, 25.0, 26.0)
    ]


@pytest.mark.parametrize("tail_bytes", [metrics.TAIL_BYTES, 9000, 30, 10])
def test_the_last_line_is_found_without_reading_all(tmp_path, make_line, monkeypatch, tail_bytes):
    monkeypatch.setattr(metrics, "TAIL_BYTES", tail_bytes)
    path = tmp_path / "metrics.jsonl"
    assert last_line(path) == {}
    path.write_text('{"step": 1, "cut')
    assert last_line(path) == {}
    lines = [make_line(step) for step in range(1, 9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "cut')
    assert last_line(path) == lines[-1]
    path.write_text(f"{json.dumps(lines[0])}\nbroken\n")
    with pytest.raises(MetricsError, match=r"metrics\.jsonl, (line 2|its last line),"):
        last_line(path)
