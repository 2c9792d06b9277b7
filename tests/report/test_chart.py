"""What a chart shows is what the numbers are."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.report.chart import BOTTOM, TOP, Curve, draw, thinned


def chart_of(*curves, points=600):
    return draw(curves, title="t", key="k", x_name="step", y_name="k", points=points, band="b")


def curve(y, **edges):
    return Curve(0, "run", np.arange(1.0, len(y) + 1), np.array(y, dtype=float), **edges)


def drawn_points(path):
    return [tuple(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", path)]


def reader(ticks):
    """From places to values, by the texts of the outer ticks."""
    first, last = ticks[0], ticks[-1]
    values = [float(tick.text.replace("k", "e3").replace("M", "e6")) for tick in (first, last)]
    return lambda at: values[0] + (at - first.at) / (last.at - first.at) * (values[1] - values[0])


@pytest.mark.parametrize("scale", [1e-7, 0.01, 1.0, 70.0, 12_345.0, 3e6])
def test_a_curve_read_by_its_axes_is_the_metric(scale):
    y = scale * np.sin(np.arange(50.0)) + 2 * scale
    chart = chart_of(curve(y))
    value_of, step_of = reader(chart.y_ticks), reader(chart.x_ticks)
    points = drawn_points(chart.curves[0].line)
    pixel = 2 * scale / (BOTTOM - TOP)
    assert [value_of(at) for _, at in points] == pytest.approx(y.tolist(), abs=pixel)
    assert [step_of(at) for at, _ in points] == pytest.approx(range(1, 51), abs=0.1)
    drawn = chart.curves[0]
    assert (drawn.first, drawn.last, drawn.least, drawn.most) == (y[0], y[-1], y.min(), y.max())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5000), st.integers(8, 700))
def test_thinning_keeps_extremes_and_ends(seed, n, points):
    y = np.random.default_rng(seed).standard_cauchy(n)
    spikes = np.random.default_rng(seed + 1).standard_cauchy(n)
    whole = curve(y, low=y - abs(spikes), high=y + abs(spikes))
    few = thinned(whole, points)
    assert len(few.x) <= points + 8
    assert (few.x[0], few.x[-1]) == (1, n)
    assert (few.y.min(), few.y.max()) == (y.min(), y.max())
    assert (few.low.min(), few.high.max()) == (whole.low.min(), whole.high.max())
    at = few.x.astype(int) - 1
    assert (np.diff(at) > 0).all()
    assert (few.y == y[at]).all()


def test_gaps_stay_gaps_and_a_lone_value_is_a_dot():
    y = [1.0] * 500 + [np.nan] * 1000 + [2.0] + [np.nan] * 500 + [3.0] * 500
    line = chart_of(curve(y), points=100).curves[0].line
    assert line.count("M") == 3
    assert line.count("h0") == 1


def test_nothing_finite_is_no_chart():
    assert chart_of(curve([np.nan, np.inf])) is None


@pytest.mark.parametrize(
    "y", [[0.0] * 3, [7.0] * 3, [1.0, 1.0 + 1e-12], [-2.0], [1e-300, 0.0], [1e200, -1e200]]
)
def test_every_range_has_an_axis(y):
    chart = chart_of(curve(y))
    assert chart.y_ticks
    assert chart.x_ticks
    assert all(TOP - 1 <= at <= BOTTOM + 1 for _, at in drawn_points(chart.curves[0].line))
    assert len({tick.text for tick in chart.y_ticks}) == len(chart.y_ticks)
