"""Which runs a comparison asks for, and what is chosen from what they reached."""

import math
import random

import numpy as np
import pytest

from asyncrl.config import SweepConfig
from asyncrl.sweep.choice import nested, next_value, ranked
from asyncrl.sweep.study import Study, Trial

SETTINGS = {
    "compare": {"a": {}, "b": {}},
    "across_values": [0, 4],
    "tune_values": [1.0, 2.0, 4.0],
    "tuning_seeds": 2,
    "seeds": 3,
}


def make_study(**changes):
    settings = SweepConfig.model_validate(SETTINGS | changes)
    return Study(
        settings, [str(v) for v in settings.across_values], [f"{v:g}" for v in settings.tune_values], 7
    )


def finish(study, reach, limit=10_000):
    """Run everything; returns what was found, in order."""
    found = {}
    for _ in range(limit):
        trials, later = study.needed(found)
        trial = next((trial for trial in trials if trial not in found), None)
        if trial is None:
            assert later == 0
            return found
        found[trial] = reach(trial)
    raise AssertionError("it never ends")


def test_each_point_is_tuned_and_its_best_is_run_with_other_seeds():
    best = {("a", "0"): "2", ("a", "4"): "2", ("b", "0"): "2", ("b", "4"): "2"}
    study = make_study()
    found = finish(study, lambda t: float(t.tuned == best[t[:2]]))
    assert len(found) == 4 * (3 * 2 + 3)
    reported = [trial for trial in found if trial.seed in study.seeds]
    assert {trial.tuned for trial in reported} == {"2"}
    assert {trial.seed for trial in reported} == {9, 10, 11}
    # The first value is finished for all before the next begins, tuned before it is reported, seed by seed.
    in_order = [*found]
    assert {trial.at for trial in in_order[:18]} == {"0"}
    assert [trial.seed for trial in in_order[12:18]] == [9, 9, 10, 10, 11, 11]


def test_the_second_best_value_is_reported_where_a_seed_that_tunes_has_it_above_the_best():
    study = make_study(across_values=[0], finalists="contested")
    assert study.needed({})[1] == 2 * 3

    def reach(trial):
        torn = trial.variant == "a" and trial.tuned == "1" and trial.seed == 7
        return 2.5 if torn else {"1": 1.0, "2": 2.0, "4": 0.0}[trial.tuned]

    reported = {trial[::2] for trial in finish(study, reach) if trial.seed in study.seeds}
    assert reported == {("a", "2"), ("a", "1"), ("b", "2")}


def test_what_follows_is_counted_before_it_is_known():
    trials, later = make_study(finalists=2).needed({})
    assert (len(trials), later) == (4 * 3 * 2, 4 * 2 * 3)


def test_a_best_at_the_edge_is_looked_for_beyond_it():
    study = make_study(compare={"a": {}}, across_values=[0], extend=3)
    found = finish(study, lambda t: -abs(math.log2(float(t.tuned)) - 4))
    assert [*dict.fromkeys(trial.tuned for trial in found)] == ["1", "2", "4", "8", "16", "32"]
    assert {trial.tuned for trial in found if trial.seed in study.seeds} == {"16"}
    down = finish(make_study(compare={"a": {}}, across_values=[0], extend=1), lambda t: -float(t.tuned))
    assert {trial.tuned for trial in down} == {"0.5", "1", "2", "4"}


def test_a_value_whose_runs_fail_is_never_chosen_and_its_edge_not_extended():
    study = make_study(compare={"a": {}}, across_values=[0])
    found = finish(study, lambda t: -math.inf if t.tuned == "4" and t.seed == 7 else float(t.tuned))
    assert {trial.tuned for trial in found if trial.seed in study.seeds} == {"2"}
    everything_fails = finish(study, lambda t: -math.inf)
    assert {trial.tuned for trial in everything_fails} == {"1", "2", "4"}


def test_a_reported_run_that_fails_takes_no_value_back():
    """What lies beyond the edge was tuned already, and is the best."""
    study = make_study(compare={"a": {}}, across_values=[0], finalists=2)
    found = finish(study, lambda t: -math.inf if (t.tuned, t.seed) == ("4", 10) else float(t.tuned))
    assert {trial.tuned for trial in found if trial.seed in study.seeds} == {"4", "8"}
    assert {*study.needed(found)[0]} == {*found}


def test_an_interrupted_study_asks_for_the_same_runs():
    study, rng = make_study(finalists=2), random.Random(0)
    reached = {}

    def reach(trial):
        return reached.setdefault(trial, rng.random())

    whole = finish(study, reach)
    for kept in range(0, len(whole), 5):
        found = dict([*whole.items()][:kept])
        trials, _ = study.needed(found)
        assert {*trials} <= {*whole}
        assert found.keys() <= {*trials}


def test_the_best_and_what_is_beyond_it():
    found = {"1": {0: 1.0, 1: 3.0}, "2": {0: 2.0, 1: 2.5}, "4": {0: 9.0}}
    assert ranked(found, [0, 1]) == ["2", "1"]
    assert next_value({"1e-4": {0: 5.0}, "3e-4": {0: 1.0}}, [0]) == "3.33333e-05"
    assert next_value({"1": {0: 1.0}, "2": {0: 2.0}, "4": {0: 1.0}}, [0]) is None


def test_no_figure_has_a_part_in_the_choice_that_it_is_reported_for():
    found = {"x": {0: 1.0, 1: 0.0, 2: 0.0, 3: 10.0}, "y": {0: 0.9, 1: 1.0, 2: 1.0, 3: 1.0}, "z": {0: 0.0}}
    chosen = nested(found, [0])
    # Without seed 3, x looks worse than y: its 10 is never reported.
    assert chosen == {1: ("x", 0.0), 2: ("x", 0.0), 3: ("y", 1.0)}
    assert nested({"x": {0: 1.0}}, [0]) == {}


def test_a_value_that_failed_with_a_reported_seed_is_not_chosen_by_the_others():
    """x failed with seed 3: for what has 3 among the other seeds it is the worst, and for 3 there is none."""
    found = {"x": {0: 1.0, 1: 0.9, 2: 0.9}, "y": {0: 0.8, 1: 0.5, 2: 0.5, 3: 0.5}, "z": {0: 0.0}}
    assert nested(found, [0]) == {1: ("y", 0.5), 2: ("y", 0.5)}
    assert nested({"x": found["x"]}, [0]) == {1: ("x", 0.9), 2: ("x", 0.9)}, "nothing else was run"
    assert nested(found | {"z": {0: 2.0}}, [0]) == {}, "the best has not been reported yet"


def test_nested_choice_among_equals_is_not_optimistic():
    """Values that do not differ, and much noise: the best mean flatters, the nested one does not."""
    rng = np.random.default_rng(0)
    flattered, reported = [], []
    for _ in range(2000):
        draws = rng.normal(size=(4, 6))
        found = {str(i): dict(enumerate(row)) for i, row in enumerate(draws)}
        flattered.append(draws.mean(axis=1).max())
        reported.append(np.mean([reached for _, reached in nested(found, [0, 1]).values()]))
    assert np.mean(flattered) > 0.3
    assert np.mean(reported) == pytest.approx(0, abs=0.05)


def test_names_that_are_not_there_are_refused():
    for wrong, words in (
        ({"baseline": "c"}, "baseline names c; compare has a, b"),
        ({"only": ["a", "z"]}, "only names z"),
        ({"tune_values": [2.0, 1.0]}, "rising order"),
        ({"compare": {}}, "compare names no variant"),
        ({"baseline": "a", "only": ["b"]}, "only leaves out the baseline a"),
        ({"across_values": [0, 4, 0]}, "across_values has a value twice"),
        ({"across": "trainer.lr"}, "across and tune are both trainer.lr"),
        ({"compare": {"a": {"trainer.lr": 1.0}}}, r"compare\.a sets trainer\.lr, .* \(tune\)"),
        ({"compare": {"a": {"staleness": {"fixed_lag": 1}}}}, r"sets staleness\.fixed_lag, .* \(across\)"),
        ({"compare": {"a": {"sweep.seeds": 2}}}, "compare.a sets `sweep`"),
    ):
        with pytest.raises(ValueError, match=words):
            SweepConfig.model_validate(SETTINGS | wrong)
    within = {"compare": {"a": {"critic": {"updates_per_policy_step": 2}}}, "tune": "critic.lr"}
    assert SweepConfig.model_validate(SETTINGS | within).reference == "a"


def test_a_trial_is_a_variant_at_two_values_with_a_seed():
    assert make_study(only=["b"]).needed({})[0][0] == Trial("b", "0", "1", 7)
