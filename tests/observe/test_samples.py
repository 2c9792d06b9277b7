"""Which responses are kept to be read, and what is shown of them."""

from collections import Counter

import numpy as np
import pytest

from asyncrl.cli.main import main
from asyncrl.core.records import Batch, FinishReason, Group, Trajectory, VersionSpan
from asyncrl.observe.samples import FILE_NAME, SamplesWriter, choose, is_kept, read_samples


def trajectory(reward, response, prompt="ab", version=3):
    ids = np.frombuffer((prompt + response).encode(), dtype=np.uint8).astype(np.int32)
    return Trajectory(
        token_ids=ids,
        loss_mask=np.arange(len(ids)) >= len(prompt),
        behavior_logprobs=np.zeros(len(ids), np.float32),
        versions=(VersionSpan(len(prompt), len(response), version),),
        finish_reason=FinishReason.STOP,
        reward=reward,
        reward_parts={"right": reward},
    )


def batch(step=4):
    groups = (
        Group(7, 70, [trajectory(0.5, "first"), trajectory(0.0, "worst")]),
        Group(8, 80, [trajectory(1.0, "best and longest"), trajectory(0.7, "x")]),
    )
    return Batch(step, step, 0, groups)


def text(ids):
    return bytes(ids).decode()


def test_the_best_the_worst_the_longest_and_the_first(tmp_path):
    with SamplesWriter(tmp_path, text) as writer:
        writer.write(batch())
    found = {sample.response: sample for sample in read_samples(tmp_path)}
    reasons = {response: sample.chosen for response, sample in found.items()}
    assert sum("random" in chosen for chosen in reasons.values()) == 1
    assert {
        response: [why for why in chosen if why != "random"]
        for response, chosen in reasons.items()
        if chosen != ["random"]
    } == {
        "best and longest": ["best", "longest"],
        "worst": ["worst"],
        "first": ["first"],
    }
    best = found["best and longest"]
    assert (best.step, best.group, best.row, best.reward, best.parts) == (5, 8, 80, 1.0, {"right": 1.0})
    assert (best.prompt, best.tokens, best.finish, best.versions) == ("ab", 16, "stop", (3, 3))


def test_a_resumed_run_writes_its_steps_once(tmp_path):
    with SamplesWriter(tmp_path, text) as writer:
        for step in range(3):
            writer.write(batch(step))
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b'{"step": 3, "cho')
    with SamplesWriter(tmp_path, text, after_step=2) as writer:
        writer.write(batch(2))
    kept = {step: len([*choose(batch(step - 1).groups, seed=step)]) for step in (1, 2, 3)}
    assert list(Counter(sample.step for sample in read_samples(tmp_path)).items()) == [*kept.items()]


def test_a_long_run_keeps_ever_fewer():
    assert [step for step in range(1, 131) if not is_kept(step)][:12] == [*range(101, 110), 111, 112, 113]
    assert sum(is_kept(step) for step in range(1, 100_001)) < 400


@pytest.fixture
def run_dir(tmp_path):
    with SamplesWriter(tmp_path, text) as writer:
        for step in (0, 1):
            writer.write(batch(step))
    return tmp_path


@pytest.mark.parametrize(
    ("options", "shown", "hidden"),
    [
        ([], ["step 2, best and longest: reward 1, right 1; 16 tokens (stop) of", "first"], "step 1"),
        (["--step", "1", "--longest"], ["step 1", "best and longest"], "worst"),
        (["--worst"], ["step 2", "worst"], "longest"),
    ],
)  # fmt: skip
def test_they_can_be_read(options, shown, hidden, run_dir, capsys):
    assert main(["samples", str(run_dir), *options]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert all(words in output for words in shown)
    assert hidden not in output


@pytest.mark.parametrize(
    ("options", "message"), [(["--step", "9"], "the nearest are of step 2"), ([], "it has no samples")]
)
def test_what_is_not_there_is_told(options, message, run_dir, capsys):
    if not options:
        (run_dir / FILE_NAME).unlink()
    assert main(["samples", str(run_dir), *options]) == 2
    assert message in capsys.readouterr().err
