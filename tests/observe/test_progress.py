import math

import pytest

from asyncrl.observe.progress import RunProgress
from asyncrl.observe.sparkline import LEVELS, sparkline
from asyncrl.units import duration, milliseconds, number, percent


@pytest.fixture
def progress(make_line):
    """Ten of 50 steps, 2 s each, the last of them read at 100 s."""
    progress = RunProgress("run", 50, 4, started_s=70.0)
    for step in range(1, 11):
        progress.add(make_line(step), now_s=100.0)
    return progress


def test_before_the_first_line_nothing_is_known():
    progress = RunProgress("run", 50, 4, started_s=0.0)
    assert progress.steps == 0 and not progress.is_done
    assert progress.pace_s() is None and progress.eta_s(5.0) is None and progress.overdue_s(500.0) is None
    assert math.isnan(progress.number("reward/mean"))


def test_one_line_gives_no_pace(make_line):
    progress = RunProgress("run", 50, 4, started_s=0.0)
    progress.add(make_line(1), now_s=1.0)
    assert progress.pace_s() is None and progress.eta_s(1.0) is None


def test_the_eta_counts_down_between_lines_and_never_goes_below_zero(progress):
    assert progress.pace_s() == 2.0
    assert progress.eta_s(100.0) == 80.0
    assert progress.eta_s(101.5) == 78.5
    assert progress.eta_s(1e6) == 0.0


def test_the_pace_is_that_of_the_last_steps(make_line):
    progress = RunProgress("run", 1000, 4, started_s=0.0)
    for step in range(1, 101):  # slow start-up, fast afterwards
        progress.add(make_line(step) | {"wall_s": 1000.0 * min(step, 50) + step}, now_s=0.0)
    assert progress.pace_s() == 1.0


def test_a_step_far_beyond_the_pace_is_overdue(progress):
    assert progress.overdue_s(110.0) is None
    assert progress.overdue_s(110.5) == 10.5


def test_a_trainer_that_goes_on_from_a_checkpoint_begins_a_pace_of_its_own(progress, make_line):
    for step in (11, 12):  # what was done by step 10 took 20 s, and less when it was repeated
        progress.add(make_line(step) | {"wall_s": 12.0 + 4 * (step - 11)}, now_s=110.0)
    assert progress.pace_s() == 4.0
    assert progress.eta_s(110.0) == 38 * 4.0
    assert progress.overdue_s(125.0) is None and progress.overdue_s(131.0) == 21.0


def test_a_finished_run_is_neither_overdue_nor_has_anything_left(progress, make_line):
    progress.add(make_line(50), now_s=200.0)
    assert progress.is_done and progress.eta_s(500.0) == 0.0 and progress.overdue_s(500.0) is None


def test_values_that_are_no_numbers_are_nan(progress):
    progress.add({"step": 11, "wall_s": 1.0, "reward/mean": "high"}, now_s=1.0)
    assert math.isnan(progress.number("reward/mean")) and math.isnan(progress.series["idle/trainer"][-1])


def test_sparkline_spans_the_levels():
    assert sparkline(range(8), 20, 0, 7) == LEVELS
    assert sparkline([-5, 100, math.nan, math.inf, 3.5], 20, 0, 7) == "▁█ █▅"


def test_sparkline_averages_what_does_not_fit():
    assert sparkline([0, 0, 7, 7, 0, 7, math.nan, 7, math.nan, math.nan], 5, 0, 7) == "▁█▅█ "
    assert len(sparkline(range(1000), 7, 0, 1000)) == 7


def test_sparkline_of_a_constant_or_empty_series():
    assert sparkline([2.0] * 3, 10, 2.0, 2.0) == "▁▁▁"
    assert sparkline([math.nan], 10, 0.0, 0.0) == " "
    assert sparkline([], 10, 0.0, 0.0) == ""


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0:00"), (6.6, "0:07"), (59.7, "1:00"), (754, "12:34"), (10862, "3:01:02")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def test_numbers_in_words():
    assert (number(12345.67, 1), number(math.nan), percent(0.125), percent(math.nan)) == (
        "12,345.7",
        "-",
        "12%",
        "-",
    )
    assert (milliseconds(0.0042), milliseconds(0.1404), milliseconds(math.nan)) == (
        "4.2 ms",
        "140 ms",
        "- ms",
    )
