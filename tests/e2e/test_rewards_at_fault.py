"""Rewards that hold up a run through the real command: a judge that is away, one that likes all alike."""

import pytest
from launched import LONG_S

pytestmark = pytest.mark.slow

JUDGE = """
from pathlib import Path

HERE = Path(__file__).parent


async def asks_a_judge(completions, **_):
    (HERE / "asked").touch()
    if not (HERE / "is_back").exists():
        raise ConnectionRefusedError("nobody listens")
    return [float(len(text) % 5) for text in completions]


def likes_all_alike(completions, **_):
    return [0.0] * len(completions)
"""


@pytest.fixture
def rewards(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text(JUDGE)
    return lambda name: f"reward.functions=[{{function: '{path}:{name}'}}]"


def test_a_run_waits_for_a_judge_for_longer_than_a_stall_and_says_so(launch, rewards, tmp_path):
    run = launch("run.steps=3", "run.stall_s=5", "run.on_stall=end", rewards("asks_a_judge"))
    text = "the service of the reward function asks_a_judge is away: rollout-0 has asked again for "
    run.wait(lambda: text in run.output.read_text(), "the absence to be told")
    run.wait_a_moment(7, before_step=1)
    (tmp_path / "is_back").touch()
    assert run.end(LONG_S) == 0
    run.assert_all_steps_are_done(3)


def test_a_run_whose_groups_are_all_dropped_ends_and_says_why_first(launch, rewards):
    alike = ("objective.advantage=grpo", "objective.filter_constant_groups=true", rewards("likes_all_alike"))
    paced = "rollout.engine=paced", "trainer.backend=paced"  # which leave the cores to whoever wants them
    run = launch("run.steps=3", "run.stall_s=5", *alike, *paced)
    assert run.end(LONG_S) == 1
    text = run.output.read_text()
    last = text[text.index("all of the last ") :]
    assert "all 4 responses of each earned the same reward (mean 0)" in last.partition(". ")[0]
    assert "So no training step has ended for " in last
    assert text[: -len(last)].endswith("\n")
    assert "holds up" not in text
