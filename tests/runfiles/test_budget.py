"""The meter of GPU hours, under a clock of the test's own."""

import asyncio
import errno

import pytest

from asyncrl.runfiles import budget as budget_module
from asyncrl.runfiles.budget import Budget, Usage, metered


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


def test_a_run_that_is_killed_again_and_again_pays_for_all_the_time_it_held_gpus(tmp_path):
    """Also for the time of steps that no metrics line is left of: of 8 GPUs for 90 s, then of 4 for 30 s."""
    first = Usage(8, started_at=1000.0, seen_at=1090.0)
    second = first.resumed(4, at=5000.0)
    assert second.seen_at == second.started_at == 5000.0
    assert second.gpu_hours(5030.0) == pytest.approx((8 * 90 + 4 * 30) / 3600)
    killed_at_once = second.resumed(8, at=6000.0)
    assert killed_at_once.earlier_gpu_hours == pytest.approx(8 * 90 / 3600)


def test_the_meter_runs_beside_the_run_and_is_read_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(budget_module, "METER_S", 0.001)
    path, clock = tmp_path / "usage.json", Clock()
    Usage(8, 1000.0, 0.5, 1000.0).save(path)

    async def run():
        async with metered(path, clock):
            clock.s = 1007.0
            async with asyncio.timeout(60.0):
                while Usage.load(path).seen_at != 1007.0:
                    await asyncio.sleep(0.001)
            monkeypatch.setattr(budget_module, "METER_S", 3600.0)
            clock.s = 1008.0
            raise RuntimeError("the run fails")

    with pytest.raises(RuntimeError, match="the run fails"):
        asyncio.run(run())
    assert Usage.load(path) == Usage(8, 1000.0, 0.5, 1008.0)
    assert [file.name for file in tmp_path.iterdir()] == ["usage.json"]


def test_a_full_disk_stops_the_meter_and_not_the_run(tmp_path, monkeypatch, caplog):
    path = tmp_path / "usage.json"
    Usage(8, 1000.0).save(path)

    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    async def run():
        async with metered(path):
            monkeypatch.setattr(Usage, "save", full)

    asyncio.run(run())
    assert "No space left" in caplog.text
    assert Usage.load(path) == Usage(8, 1000.0)
