"""Intervals and corrections, against printed tables, direct counting and numpy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.sweep.statistics import holm, interval, t_quantile, t_within

TABLE = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 7: 2.36462, 8: 2.30600, 30: 2.04227, 120: 1.97993}
"""Of Student's t, two-sided 95%, by degrees of freedom (scipy.stats.t.ppf(0.975, dof))."""


@pytest.mark.parametrize(("dof", "t"), TABLE.items())
def test_student_s_distribution(dof, t):
    assert t_quantile(0.95, dof) == pytest.approx(t, abs=6e-5 * t)
    assert t_within(t_quantile(0.8, dof), dof) == pytest.approx(0.8, abs=1e-12)
    assert t_within(0.0, dof) == 0
    # The density, integrated.
    x = np.linspace(0, 1.7, 20_001)
    scale = math.gamma((dof + 1) / 2) / math.sqrt(dof * math.pi) / math.gamma(dof / 2)
    density = scale * (1 + x**2 / dof) ** (-(dof + 1) / 2)
    assert t_within(1.7, dof) == pytest.approx(2 * np.trapezoid(density, x), abs=1e-8)


def test_an_interval_of_pairs_differences():
    """Student 1908, the two soporifics: mean 1.58, t 4.0621 with 9 degrees of freedom, p 0.00283."""
    extra = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = interval(extra)
    assert (found.mean, found.n) == (pytest.approx(1.58), 10)
    assert found.p == pytest.approx(0.00283289, abs=1e-8)
    assert (found.low, found.high) == (pytest.approx(0.7001142), pytest.approx(2.4598858))


def test_an_interval_covers_the_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(0.3, 1, size=(3000, 4))
    covered = np.mean([(found := interval(list(row))).low <= 0.3 <= found.high for row in samples])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_too_few_or_equal_values():
    assert interval([2.0]).mean == 2
    assert math.isnan(interval([2.0]).low)
    assert math.isnan(interval([]).mean)
    assert interval([0.0, 0.0]).p == 1
    for equal in ([0.5, 0.5, 0.5], [0.1 + 0.2, 0.3, 0.3]):
        assert math.isnan(interval(equal).p)
        assert math.isnan(interval(equal).low)


def test_holm_s_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1, 1]
    with_gap = holm([0.02, math.nan, 0.01])
    assert with_gap[0] == with_gap[2] == pytest.approx(0.02)
    assert math.isnan(with_gap[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20), st.floats(0.001, 0.5))
def test_holm_rejects_what_stepping_down_rejects(ps, level):
    rejected = set()
    for rank, (p, i) in enumerate(sorted((p, i) for i, p in enumerate(ps))):
        if min(1.0, p * (len(ps) - rank)) > level:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(ps)) if p <= level} == rejected
