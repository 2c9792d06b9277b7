"""What a run has trained on is trained again, and comes out the same bit by bit."""

import json

import pytest
import torch

import asyncrl
from asyncrl.cli.main import main
from asyncrl.runfiles.layout import RunDir
from asyncrl.runfiles.replay import ReplayError, replay
from asyncrl.runfiles.state import open_ledger
from asyncrl.trainer.backends.torch.backend import TorchTrainer

CHECKPOINTS = ("checkpoint.every_steps=2", "checkpoint.keep_last=3")


@pytest.fixture
def inline_run(make_config, one_thread):
    config = make_config("run.mode=inline", "trainer.mini_batches=2", *CHECKPOINTS)
    return asyncrl.run(config, progress=False).run_dir


def assert_same(steps, numbers):
    steps = list(steps)
    assert [step.step for step in steps] == list(numbers)
    assert [step.loss for step in steps] == [step.recorded_loss for step in steps]
    assert [step.grad_norm for step in steps] == [step.recorded_grad_norm for step in steps]
    assert [step.same_weights for step in steps] == [None if n % 2 else True for n in numbers]


def test_an_inline_run_is_replayed_whole_or_in_part(inline_run):
    assert_same(replay(inline_run), range(1, 7))
    assert_same(replay(inline_run, from_step=4), range(5, 7))
    assert_same(replay(inline_run, from_step=2, to_step=5), range(3, 6))


def test_a_step_is_repeated_with_the_threads_that_it_had(inline_run, monkeypatch):
    path = inline_run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["threads/trainer"] = 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    step, seen = TorchTrainer.step, []

    def seen_step(*arguments):
        seen.append(torch.get_num_threads())
        return step(*arguments)

    monkeypatch.setattr(TorchTrainer, "step", seen_step)
    assert len(list(replay(inline_run, to_step=4))) == 4
    assert seen == [1, 1, 2, 1]


@pytest.mark.slow
def test_an_asynchronous_run_that_keeps_its_batches_is_replayed(make_config, one_thread):
    config = make_config("run.record=true", "trainer.threads=1", *CHECKPOINTS)
    run_dir = asyncrl.run(config, progress=False).run_dir
    torch.set_num_threads(1)
    assert_same(replay(run_dir), range(1, 7))
    assert_same(replay(run_dir, from_step=4), range(5, 7))


def test_the_command_says_at_which_checkpoint_the_weights_differ(inline_run, capsys):
    assert main(["replay", str(inline_run)]) == 0
    assert capsys.readouterr().out.count("the same as the checkpoint's") == 3
    path = inline_run / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.001\n", "lr: 0.002\n", 1))
    assert main(["replay", str(inline_run), "--to-step", "2"]) == 1
    assert "NOT the same as the checkpoint's" in capsys.readouterr().out


def test_what_was_not_kept_cannot_be_replayed(inline_run, capsys):
    with open_ledger(RunDir(inline_run)) as store:
        store.forget_trained(3)
    with pytest.raises(ReplayError, match=r"has not kept the batch of step 0: set run\.record=true"):
        list(replay(inline_run))
    assert_same(replay(inline_run, from_step=4), range(5, 7))
    assert main(["replay", str(inline_run), "--from-step", "5"]) == 1
    assert "no checkpoint of step 5; there are: 2, 4, 6" in capsys.readouterr().err
