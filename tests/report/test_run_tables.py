"""`asyncrl.Run`: tables of a run that goes on, has ended or was killed."""

import json
import math

import msgspec
import pytest

import asyncrl
from asyncrl.core.coordinator import LoopSettings
from asyncrl.core.records import GroupSummary
from asyncrl.observe.histogram import Histogram
from asyncrl.observe.samples import FILE_NAME as SAMPLES
from asyncrl.runfiles.evaluation import Result
from asyncrl.runfiles.store import LedgerStore

SAMPLE = {"step": 1, "chosen": ["best"], "group": 1, "row": 2, "reward": 0.5, "parts": {"right": 0.5}}
SAMPLE |= {"tokens": 3, "finish": "stop", "versions": [0, 1], "prompt": "p", "response": "r"}


@pytest.fixture
def run(make_run, make_line):
    measured = {"eval/math/mean": 0.5, "eval/math/pass_at/4": 0.75, "eval/code/mean": 0.25}
    histogram = {"reward/histogram": {"edges": [0.0, 0.5, 1.0], "counts": [3, 1]}}
    folder = make_run(lines=[make_line(1) | histogram, make_line(2, warnings=["too hot"])])
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "results.jsonl").write_bytes(msgspec.json.encode(Result(1, measured, 3.0)))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "wa')  # it was killed
    (folder / SAMPLES).write_text(json.dumps(SAMPLE) + "\n" + json.dumps(SAMPLE | {"parts": {}}) + "\n")
    return asyncrl.Run(folder)


def test_metrics_samples_and_evaluations_are_columns(run, make_line):
    metrics = run.metrics
    assert metrics["step"].tolist() == [1, 2]
    assert metrics["reward/mean"].tolist() == [make_line(step)["reward/mean"] for step in (1, 2)]
    assert "warnings" not in metrics and "reward/histogram" not in metrics
    assert {len(column) for column in metrics.values()} == {2}
    assert run.warnings == {"step": [2], "warning": ["too hot"]}
    assert run.histograms["of"] == ["reward", "token_age", "token_age"]
    assert run.histograms["counts"][0] == (3, 1)
    samples = run.samples
    assert (samples["finish"], samples["reward/right"]) == (["stop"] * 2, [0.5, None])
    evaluations = run.evaluations
    assert (evaluations["set"], evaluations["mean"]) == (["math", "code"], [0.5, 0.25])
    assert evaluations["version"] == [1, 1]
    assert evaluations["pass_at/4"][0] == 0.75
    assert math.isnan(evaluations["pass_at/4"][1])
    assert repr(run).endswith("not finished: 2 of 40 steps are done")


def test_its_tables_are_data_frames(run):
    frame = pytest.importorskip("pandas").DataFrame
    tables = run.metrics, run.samples, run.warnings, run.histograms, run.evaluations, run.ledger
    assert [len(frame(table)) for table in tables] == [2, 2, 1, 3, 2, 0]


def test_the_ledger_of_a_run_that_goes_on(run):
    store = LedgerStore(run.path / "ledger.db", encode=str.encode, decode=bytes.decode)
    coordinator = store.load(LoopSettings(1, 4, "wait", 10, max_attempts=1), 5, 0, shuffle=False)
    first, second = coordinator.lease("w", 0, 2)
    summary = GroupSummary({0: 100}, (1.0, math.nan))
    coordinator.submit(first.group_id, first.lease_id, summary, "group")
    coordinator.fail(second.group_id, second.lease_id, "the reward raised", sampled_tokens=30)
    store.save(coordinator)
    ledger = run.ledger  # while it is open
    assert ledger["state"] == ["ready", "failed"]
    assert ledger["sampled_tokens"] == [100, 0]
    assert ledger["tokens_by_version"] == [{0: 100}, None]
    assert ledger["rewards"] == [[1.0, None], None]
    store.close()


def test_a_run_that_has_not_stepped_yet(make_run):
    folder = make_run()
    (folder / "metrics.jsonl").unlink()
    run = asyncrl.Run(folder)
    assert run.metrics == run.ledger == {}
    assert [*map(len, run.samples.values())].count(0) == len(run.samples)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(asyncrl.ConfigError, match="neither config"):
        asyncrl.Run(tmp_path)


def test_a_histogram_is_read_as_it_was_written():
    assert Histogram.of([math.nan]) is None
    assert sum(Histogram.of([1.0, 1.0, 2.0]).counts) == 3
