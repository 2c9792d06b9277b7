import math

import pytest

from asyncrl.trainer.schedule import SHAPES, Schedule

BASE = {"peak": 2.0, "total_steps": 11, "min_share": 0.1}


def test_warm_up_rises_linearly_to_the_peak_and_never_starts_at_zero():
    rates = [Schedule(shape="constant", warmup_steps=4, **BASE)(s) for s in range(7)]
    assert rates == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0, 2.0])


def test_linear_and_cosine_fall_from_the_peak_to_the_minimum_at_the_last_step():
    for schedule in ("linear", "cosine"):
        rates = [Schedule(shape=schedule, warmup_steps=2, **BASE)(s) for s in range(13)]
        assert rates[2] == 2.0
        assert rates[10] == rates[12] == pytest.approx(0.2)
        assert rates[2:11] == sorted(set(rates[2:11]), reverse=True)
    middle = Schedule(shape="linear", warmup_steps=2, **BASE)(6)
    assert middle == pytest.approx(1.1)
    quarter = Schedule(shape="cosine", warmup_steps=2, **BASE)(4)
    assert quarter == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("schedule", SHAPES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (5, 3), (3, 3)])
def test_short_runs_have_positive_rates_up_to_the_peak(schedule, warmup, total):
    for step in range(total):
        rate = Schedule(1.0, schedule, warmup, total, 0.0)(step)
        assert 0 < rate <= 1
