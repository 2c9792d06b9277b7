"""The meter of GPU hours, under a clock of the test's own."""

import pytest

from asyncrl.runtime.budget import Budget, Usage


class Clock:
    def __init__(self):
        self.s = 1000.0

    def __call__(self):
        return self.s


def make_budget(gpu_hours, *, gpus=8, total_steps=100, earlier=0.0):
    clock = Clock()
    return Budget(Usage(gpus, clock.s, earlier), gpu_hours, total_steps, clock), clock


def run(budget, clock, steps, step_s):
    for _ in range(steps):
        clock.s += step_s
        budget.stepped(step_s)


def test_gpus_are_paid_for_from_the_start_whatever_they_do():
    budget, clock = make_budget(None, gpus=8, earlier=2.0)
    clock.s += 1800
    assert budget.spent_gpu_hours == pytest.approx(2.0 + 8 * 0.5)


def test_without_a_budget_all_steps_are_made():
    budget, clock = make_budget(None)
    run(budget, clock, 3, 3600.0)
    assert budget.total_steps(3) == 100
    assert not budget.is_spent


def test_the_run_shrinks_to_what_the_budget_pays_for_and_ends_before_it_is_overspent():
    budget, clock = make_budget(8.0)  # one hour of eight GPUs
    done = 0
    while not budget.is_spent:
        run(budget, clock, 1, 90.0)
        done += 1
        if done > 1:
            assert budget.total_steps(done) in (40, done + 1)
    assert done == 40
    assert budget.spent_gpu_hours <= 8.0


def test_a_budget_that_is_large_enough_changes_nothing():
    budget, clock = make_budget(8.0)
    run(budget, clock, 20, 10.0)
    assert budget.total_steps(20) == 100
    metrics = dict(budget.metrics(20))
    assert metrics["budget/eta_s"] == pytest.approx(800.0)
    assert metrics["budget/expected_gpu_hours"] == pytest.approx(8 * 1000 / 3600)


def test_one_slow_step_does_not_change_the_pace():
    budget, clock = make_budget(8.0)
    run(budget, clock, 9, 10.0)
    run(budget, clock, 1, 300.0)
    assert dict(budget.metrics(10))["budget/eta_s"] == pytest.approx(900.0)


def test_after_the_last_step_nothing_is_left():
    budget, clock = make_budget(None, total_steps=2)
    run(budget, clock, 2, 10.0)
    assert dict(budget.metrics(2))["budget/eta_s"] == 0.0


def test_usage_survives_its_file(tmp_path):
    usage = Usage(8, 123.5, 1.25)
    usage.save(tmp_path / "usage.json")
    assert Usage.load(tmp_path / "usage.json") == usage
