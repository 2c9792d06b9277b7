"""The rounds of evaluation in a run directory, and the checkpoints that go by them."""

import asyncio
import os

import msgspec
import pytest
import torch

from asyncrl.config import CheckpointConfig
from asyncrl.evaluation.worker import carry_out
from asyncrl.runfiles.checkpoints import CheckpointState
from asyncrl.runfiles.evaluation import Result, Rounds, checkpoints_of
from asyncrl.runfiles.layout import RunDir
from asyncrl.weights.source import WeightsError


@pytest.fixture
def rounds(tmp_path):
    return Rounds(RunDir(tmp_path).evaluation)


def test_a_round_waits_with_its_weights_until_its_result_is_there(rounds):
    assert rounds.pending() == [] and rounds.results() == {}
    weights = {"b": torch.ones(2, dtype=torch.bfloat16), "a": torch.arange(6.0).view(2, 3)}
    for version in (10, 8):
        rounds.keep(version, weights)
    assert rounds.pending() == [8, 10]
    source = Rounds(rounds.path).source(8)
    assert source.version == 8
    tensors = source.tensors()
    assert list(tensors) == ["b", "a"]  # as published: adapters go by it
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors.items())
    rounds.finish(Result(10, {"eval/held_out/reward/mean": 0.25}, 1.0), b"{}\n")
    rounds.finish(Result(8, {"eval/held_out/reward/mean": 0.5}, 1.0), b"{}\n")
    with rounds.results_file.open("ab") as file:
        file.write(msgspec.json.encode(Result(12, {}, 1.0))[:9])  # cut short by a crash
    assert rounds.pending() == [] and list(rounds.results()) == [8, 10]
    assert [rounds.is_known(version) for version in (8, 9, 10, 12)] == [True, False, True, False]
    assert rounds.responses(8).read_bytes() == b"{}\n"


def test_a_result_after_a_line_that_was_cut_short_is_read(rounds):
    rounds.keep(2, {"a": torch.ones(1)})
    rounds.results_file.write_bytes(b'{"version":1,')
    rounds.finish(Result(2, {}, 1.0), b"")
    assert list(rounds.results()) == [2]


def test_damaged_weights_are_no_weights(rounds):
    rounds.keep(3, {"a": torch.ones(100)})
    (path,) = (path for path in rounds.path.iterdir())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="checksum does not match"):
        rounds.source(3).tensors()
    rounds.set_aside(3)
    assert rounds.pending() == []
    assert rounds.is_known(3)


def test_the_best_checkpoints_are_those_of_the_best_metric_and_unscored_ones_stay_till_then(tmp_path):
    run_dir, metric = RunDir(tmp_path), "eval/held_out/reward/mean"
    rounds = Rounds(run_dir.evaluation)
    checkpoints = checkpoints_of(run_dir, CheckpointConfig(keep_last=1, keep_best=1, best_of=metric))

    def scored(version, value):
        rounds.finish(Result(version, {metric: value}, 1.0), b"")

    def steps():
        return [checkpoint.step for checkpoint in checkpoints.all()]

    for step in (2, 4, 5, 6, 8):
        if step % 2 == 0:
            rounds.keep(step, {"a": torch.ones(1)})
        checkpoints.write(CheckpointState(step, float(step), ""), lambda folder: None)
    assert steps() == [8, 6, 5, 4, 2]
    for version, value in ((4, 0.5), (2, 0.3)):
        scored(version, value)
    checkpoints.rotate()
    assert steps() == [8, 6, 4]
    scored(6, 0.1)
    scored(8, 0.4)
    checkpoints.rotate()
    assert steps() == [8, 4]


def test_a_result_is_on_the_disk_before_its_weights_are_gone(rounds, monkeypatch):
    rounds.keep(2, {"a": torch.ones(1)})
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append((list(rounds.results()), rounds.pending())))
    rounds.finish(Result(2, {}, 1.0), b"")
    assert synced == [([2], [2])] and rounds.pending() == []


def test_a_round_that_a_crash_left_with_its_weights_is_not_carried_out_again(rounds, monkeypatch):
    rounds.keep(2, {"a": torch.ones(1)})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Rounds, "forget", lambda *_: _killed())
        rounds.finish(Result(2, {}, 1.0), b"first")
    assert rounds.pending() == [2]
    asyncio.run(carry_out(None, rounds, 2))  # asks no evaluator
    assert rounds.pending() == []
    assert rounds.responses(2).read_bytes() == b"first"


def _killed():
    raise KeyboardInterrupt
