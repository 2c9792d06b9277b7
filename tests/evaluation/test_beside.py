"""Evaluation from the side of the trainer: what is kept of which version, and what is told."""

import asyncio
import math
from collections import namedtuple

import pytest
import torch

from asyncrl.evaluation import beside
from asyncrl.evaluation.beside import EvaluatedLink
from asyncrl.loop.trainer import TrainerLink
from asyncrl.observe.metric_table import unnamed
from asyncrl.runfiles.evaluation import Result, Rounds
from asyncrl.runfiles.layout import RunDir
from asyncrl.weights.published import WholeWeights

MEAN = "eval/held_out/reward/mean"


class Alone(TrainerLink):
    """A link to nobody."""

    async def begin(self, version):
        return version

    async def publish(self, version, weights, canary):
        return {}


class Fixed:
    """A trainer whose weights stay."""

    def weights(self):
        return WholeWeights({"a": torch.ones(256)})


@pytest.fixture
def rounds(tmp_path):
    found = Rounds(RunDir(tmp_path / "run").evaluation)
    found.path.mkdir(parents=True)
    return found


@pytest.fixture
def link(make_config, rounds):
    own = (
        "evaluation.every_steps=5",
        "data.held_out_rows=4",
        "run.steps=20",
        "run.stall_s=1",
        "run.start_s=1",
    )
    run_dir = RunDir(rounds.path.parent)
    return EvaluatedLink(make_config(*own), run_dir, Alone(), Fixed())


def scored(rounds, *versions):
    for version in versions:
        rounds.keep(version, {"a": torch.ones(1)})
        rounds.finish(Result(version, {MEAN: float(version)}, 2.0, 0.5), b"")


def test_a_run_that_goes_on_tells_of_no_version_that_is_still_to_come_again(link, rounds):
    scored(rounds, 0, 5, 10)
    lines = '{"step": 1, "eval/version": 0}', '{"step": 8, "eval/version": 5}'
    (rounds.path.parent / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    async def go_on():
        await link.begin(8)
        return [await link.publish(version, None, None) for version in (8, 9, 10)]

    told = asyncio.run(go_on())
    assert [line.get("eval/version") for line in told] == [None, None, 10]
    assert (told[-1]["eval/seconds"], told[-1]["eval/generate_frac"]) == (2.0, 0.25)


def test_all_rounds_that_are_done_late_reach_the_last_line_and_are_told_once(link, rounds):
    lines = (
        '{"step": 5, "eval/version": 0}',
        '{"step": 20, "eval/version": 10, "earlier_rounds": [{"eval/version": 5}]}',
    )
    (rounds.path.parent / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    async def go_on():
        await link.begin(20)
        link._version = 20
        scored(rounds, 0, 5, 10, 15, 20)
        link._keep = lambda version: None
        return await link.conclude()

    assert not rounds.trained.exists()
    told = asyncio.run(go_on())
    assert rounds.trained.exists()  # nothing is to be spared any more
    assert (told["eval/version"], told[MEAN]) == (20, 20.0)
    assert [(each["eval/version"], each[MEAN]) for each in told["earlier_rounds"]] == [(15, 15.0)]
    assert not unnamed([*told, *told["earlier_rounds"][0]])
    asyncio.run(link.begin(20))
    assert not rounds.trained.exists()


def test_the_weights_of_the_last_version_are_whole_before_a_run_without_further_steps_ends(link, rounds):
    async def go_on():
        await link.begin(20)
        await link.publish(20, Fixed().weights(), None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(beside, "read_pulses", lambda _: {})
            await link.rounds_done()

    asyncio.run(go_on())
    assert rounds.pending() == [20]  # there is nobody to score it, as the log says


def test_a_version_is_left_out_rather_than_the_disk_filled(link, rounds, monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")

    async def go_on():
        await link.begin(0)
        for version, free in ((0, math.inf), (5, 8 * 1024 - 1), (10, 8 * 1024)):
            monkeypatch.setattr(beside.shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
            await link.publish(version, Fixed().weights(), None)
            await link._have_kept()

    asyncio.run(go_on())
    assert rounds.pending() == [0, 10]
    assert "version 5 is not evaluated" in caplog.text
    assert "evaluation.every_steps" in caplog.text
