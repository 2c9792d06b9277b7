"""What is taken for a reward."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from asyncrl.reward.score import checked_values


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5, None],
        (True, Fraction(1, 2), None),
        [np.float32(1), np.float64(0.5), None],
        [torch.tensor(1.0), torch.tensor([0.5]), None],
    ],
)
def test_numbers_of_any_kind_are_rewards(returned):
    assert checked_values(returned, 3) == [1.0, 0.5, None]


@pytest.mark.parametrize("returned", [np.array([1, 2]), torch.tensor([1.0, 2.0])])
def test_arrays_are_lists(returned):
    assert checked_values(returned, 2) == [1.0, 2.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), 10**400])
def test_what_is_not_finite_is_refused_with_its_index(value):
    with pytest.raises(ValueError, match=r"result 1 is (nan|-?inf): a reward must be finite"):
        checked_values([0.0, value], 2)


@pytest.mark.parametrize("value", ["1.0", [1.0], Decimal(1), {}, object(), torch.ones(2)])
def test_what_is_no_number_is_refused_with_its_index(value):
    with pytest.raises(ValueError, match=r"result 1 is .*; it should be a number or None"):
        checked_values([0.0, value], 2)


@pytest.mark.parametrize("returned", [[], [1.0], [1.0] * 3])
def test_a_wrong_number_of_results_is_refused(returned):
    with pytest.raises(ValueError, match=f"{len(returned)} results for 2 completions"):
        checked_values(returned, 2)


@pytest.mark.parametrize("returned", [1.0, None, "ab", {0: 1.0, 1: 2.0}, iter([1.0, 2.0]), np.float64(1)])
def test_what_is_no_list_is_refused(returned):
    with pytest.raises(ValueError, match="it should return a list"):
        checked_values(returned, 2)
