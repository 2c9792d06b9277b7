"""What is wrong is told once, and what is not wrong never."""

import json
import math
from pathlib import Path

import pytest

from asyncrl import config as settings
from asyncrl.observe.metric_table import unnamed
from asyncrl.observe.symptoms import WINDOW, RunFacts, Symptoms

RECORDED = json.loads((Path(__file__).parent / "recorded_runs.json").read_text())
"""Lines of metrics of real runs, as columns of three digits, as far as the rules look at them."""


def step(truncated=0.0, zero=0.0):
    return {"truncated_frac": truncated, "adv/zero_groups_frac": zero, "reward/mean": 0.25}


def test_responses_that_are_all_cut_off_are_told_once():
    symptoms = Symptoms(40, 256)
    assert symptoms.of(step(truncated=1.0)) == symptoms.of(step(truncated=1.0)) == []
    (told,) = symptoms.of(step(truncated=1.0))
    assert "all of the first 120 responses were cut off at rollout.max_new_tokens=256" in told
    assert "rollout.stop_token_ids" in told
    assert symptoms.of(step(truncated=1.0)) == []


def test_one_response_that_ends_by_itself_is_enough():
    symptoms = Symptoms(40, 256)
    assert symptoms.of(step(truncated=0.99)) == []
    assert all(symptoms.of(step(truncated=1.0)) == [] for _ in range(10))


def test_steps_that_train_on_nothing_are_told_when_there_are_many_in_a_row():
    symptoms = Symptoms(40, 256)
    for _ in range(2):
        assert all(symptoms.of(step(zero=1.0)) == [] for _ in range(9))
        assert symptoms.of(step(zero=0.9)) == []
    assert all(symptoms.of(step(zero=1.0)) == [] for _ in range(9))
    (told,) = symptoms.of(step(zero=1.0))
    assert "10 steps in a row had no learning signal" in told
    assert "all rewards of each group are equal (mean 0.25)" in told
    assert all(symptoms.of(step(zero=1.0)) == [] for _ in range(20))


def test_a_run_that_goes_on_is_not_judged_by_its_later_responses():
    symptoms = Symptoms(40, 256, is_new=False)
    assert all(symptoms.of(step(truncated=1.0)) == [] for _ in range(10))


def replayed(run):
    """(step, what is told) of all lines of a recorded run."""
    facts = RunFacts(**run["facts"])
    symptoms = Symptoms(run["responses_per_step"], run["max_new_tokens"], facts=facts)
    columns = run["columns"]
    for i, number in enumerate(columns["step"]):
        row = {key: math.nan if column[i] is None else column[i] for key, column in columns.items()}
        yield from ((number, text) for text in symptoms.of(row))


@pytest.mark.parametrize("name", RECORDED["healthy"])
def test_a_healthy_run_shows_nothing(name):
    assert list(replayed(RECORDED["healthy"][name])) == []


def test_guests_leave_as_they_like():
    ill = RECORDED["ill"]["dying_worker"]
    columns = {key.replace("rollout-0", "rollout-2"): column for key, column in ill["columns"].items()}

    def told(workers):
        facts = ill["facts"] | {"workers": workers}
        run = ill | {"columns": columns, "facts": facts}
        return [text for _, text in replayed(run) if "again and again" in text]

    assert told(2) == []
    assert len(told(3)) == 1


SAYS = {
    "starved_trainer": ("starved trainer", "rollout.workers"),
    "starved_rollout": ("starved rollout", "trainer.ranks"),
    "slow_reward": ("slow reward", "the longest for `functions`", "reward.workers"),
    "dying_worker": ("rollout-0 dies again and again", "logs/rollout-0.log", "rollout.slots"),
    "stale_data": ("stale data", "6.2 versions old", "staleness.max_staleness=8"),
    "stale_data_dropped": ("stale data", "staleness.on_stale=wait"),
    "collapsed_entropy": ("collapsing entropy", "while the reward did not rise", "objective.entropy_coef"),
    "blown_up_length": ("length blow-up", "while the reward did not rise", "reward.overlong.buffer_tokens"),
    "hacked_reward": ("possible reward hacking, steps", "the score of `judge` rose", "`exact_match` fell"),
}


def test_every_illness_was_recorded():
    assert RECORDED["ill"].keys() == SAYS.keys()


def test_what_was_recorded_is_still_written():
    """A metric that is called otherwise now would blind the rules, and not these tests."""
    assert not {key for runs in RECORDED.values() for run in runs.values() for key in unnamed(run["columns"])}


@pytest.mark.parametrize("name", RECORDED["ill"])
def test_an_ill_run_says_once_what_it_has_and_what_to_change(name):
    told = [text for _, text in replayed(RECORDED["ill"][name]) if text.startswith(SAYS[name][0])]
    assert len(told) == 1
    for part in SAYS[name]:
        assert part in told[0]


def waiting(trainer, rollout):
    return {"idle/trainer": trainer, "idle/rollout": rollout, "time/step_s": 1.0}


def test_what_comes_again_is_told_again():
    symptoms = Symptoms(40, 256)
    ill, well = waiting(0.97, 0.0), waiting(0.2, 0.1)
    told = [len(symptoms.of(row)) for row in WINDOW * [ill] + 3 * WINDOW * [well] + WINDOW * [ill]]
    assert [at for at, n in enumerate(told) if n] == [WINDOW - 1, len(told) - 4]  # 17 of 20 are ill


def test_a_run_that_goes_on_knows_what_it_was_like_and_what_was_told(tmp_path, make_line):
    tree = {
        "model": {"path": "m"},
        "data": {"path": "d.jsonl"},
        "reward": {"functions": [{"function": "asyncrl.tiny.skill:exact_match"}]},
    }
    starved = {"idle/trainer": 0.99, "idle/rollout": 0.0}
    starved["reward/mean"] = 0.5
    lines = [make_line(step) | starved for step in range(1, 31)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    symptoms = Symptoms.of_run(settings.from_tree(tree), tmp_path, 25)
    rows = [make_line(step, response_tokens__mean=60.0) | starved for step in range(26, 41)]
    told = [text.partition(":")[0] for row in rows for text in symptoms.of(row)]
    assert told == ["length blow-up"]  # since the first step; and nothing of the trainer, which was told


def test_shares_are_of_the_time_and_not_of_the_steps():
    symptoms = Symptoms(40, 256)
    rows = WINDOW // 2 * [waiting(1.0, 0.0), waiting(0.0, 0.0) | {"time/step_s": 0.001}]
    assert [text.partition(":")[0] for row in rows for text in symptoms.of(row)] == ["starved trainer"]


def test_who_takes_turns_by_its_settings_does_not_starve():
    symptoms = Symptoms(40, 256, facts=RunFacts(takes_turns=True))
    assert not [text for row in WINDOW * [waiting(0.99, 0.0)] for text in symptoms.of(row)]


def learning(**changes):
    row = {"reward/mean": 0.5, "reward/std": 0.2, "entropy": 1.0, "response_tokens/mean": 10.0, "step": 1}
    return row | {key.replace("__", "/"): value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("then", "told"),
    [
        ({"entropy": 0.05}, "collapsing entropy"),
        ({"entropy": 0.05, "reward__mean": 0.9}, None),  # it has learnt
        ({"entropy": 0.2}, None),
        ({"response_tokens__mean": 21.0}, "length blow-up"),
        ({"response_tokens__mean": 21.0, "reward__mean": 0.9}, None),
        ({"entropy": math.nan, "response_tokens__mean": math.nan, "reward__mean": math.nan}, None),
    ],
)
def test_what_is_learnt_is_judged_by_the_reward(then, told):
    symptoms = Symptoms(40, 256)
    rows = 10 * [learning()] + 10 * [learning(**then)]
    found = [text.partition(":")[0] for row in rows for text in symptoms.of(row)]
    assert found == ([] if told is None else [told])


@pytest.mark.parametrize(
    ("judged", "ruled", "is_told"), [(0.9, 0.1, True), (0.9, 0.5, False), (0.5, 0.1, False)]
)
def test_a_hacked_reward_is_a_score_that_rises_while_a_rule_s_falls(judged, ruled, is_told):
    symptoms = Symptoms(40, 256, facts=RunFacts(judged=["judge"], rules=["rule"]))

    def row(step, judged, ruled):
        parts = {"reward/judge/mean": judged, "reward/judge/std": 0.2, "reward/rule/mean": ruled}
        return learning(response_tokens__mean=19.0 if step > 40 else 10.0, step=step) | parts

    rows = [row(i, 0.2, 0.3) for i in range(1, 21)] + [row(i, 0.5, 0.5) for i in range(21, 41)]
    rows += [row(i, judged, ruled) for i in range(41, 51)]
    told = [text for each in rows for text in symptoms.of(each)]
    assert [text.partition(":")[0] for text in told] == ["possible reward hacking, steps 21-45"] * is_told
    if told:
        assert "responses became 1.9 times as long, the score of `judge` rose (0.5 to 0.9) and" in told[0]
