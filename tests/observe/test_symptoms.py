"""What is wrong is told once, and what is not wrong never."""

from asyncrl.observe.symptoms import Symptoms


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
