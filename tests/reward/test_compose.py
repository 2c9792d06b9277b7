"""From parts to rewards."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import RewardConfig
from asyncrl.reward.compose import PartRule, Scale, compose, part_rules


def test_the_reward_is_the_weighted_sum_of_the_parts_that_apply():
    rules = [PartRule("a", 2.0), PartRule("b", -0.5), PartRule("c")]
    assert compose({"a": 1.0, "b": 3.0}, rules) == 2.0 - 1.5
    assert compose({"c": 0.25}, rules) == 0.25


def test_a_response_that_nothing_but_shaping_applies_to_is_refused():
    rules = [PartRule("a"), PartRule("overlong", shaping=True)]
    with pytest.raises(ValueError, match="no reward function or model applies"):
        compose({"overlong": -0.5}, rules)
    assert compose({"a": 1.0, "overlong": -0.5}, rules) == 0.5
    assert compose({"own": 2.0, "overlong": -0.5}, rules) == 1.5, "an episode's own part has no rule"


def test_a_sum_that_overflows_is_refused():
    with pytest.raises(ValueError, match=r"the weighted sum is inf; its parts are \{'a': 1e\+308\}"):
        compose({"a": 1e308}, [PartRule("a", 10.0)])


@pytest.mark.parametrize(("score", "capped"), [(5.0, 0.0), (2.0, 0.0), (1.5, -0.5), (-3.0, -5.0)])
def test_the_cap_leaves_nothing_to_win_above_it(score, capped):
    """Clip of Gao et al.: min(r - eta, 0)."""
    assert compose({"m": score}, [PartRule("m", cap=2.0)]) == capped


@pytest.mark.parametrize(("score", "clipped"), [(-9.0, -1.0), (0.5, 0.5), (9.0, 2.0)])
def test_values_are_clipped_into_their_bounds(score, clipped):
    assert compose({"m": score}, [PartRule("m", clip=(-1.0, 2.0))]) == clipped


@pytest.mark.parametrize(("rule", "earned"), [(1.0, 1.0 + 3.0), (0.0, 0.0), (-1.0, -1.0), (None, 3.0)])
def test_a_gated_part_counts_where_its_rule_passes_or_does_not_apply(rule, earned):
    values = {"model": 3.0} | ({} if rule is None else {"rule": rule})
    assert compose(values, [PartRule("rule"), PartRule("model", gate="rule")]) == earned


@given(st.floats(-1e6, 1e6))
def test_a_sigmoid_maps_any_score_between_0_and_1(score):
    squashed = compose({"m": score}, [PartRule("m", sigmoid=True)])
    assert 0 <= squashed <= 1
    if abs(score) < 30:
        assert squashed == pytest.approx(1 / (1 + math.exp(-score)))


def test_a_standardised_part_is_measured_by_its_scale_and_clipped_after_it():
    rules = [PartRule("m", 2.0, standardise=True, clip=(-1.0, 1.0)), PartRule("f")]
    scales = {"m": Scale(mean=10.0, std=4.0)}
    assert compose({"m": 12.0, "f": 1.0}, rules, scales) == 2 * 0.5 + 1.0
    assert compose({"m": 30.0, "f": 1.0}, rules, scales) == 2 * 1.0 + 1.0
    assert compose({"m": 12.0, "f": 1.0}, rules) == 2 * 12.0 + 1.0, "without a scale it is not clipped"


def test_the_rules_are_those_of_the_settings():
    config = RewardConfig.model_validate(
        {
            "functions": [{"function": "a:right", "weight": 0.5}],
            "models": [
                {"path": "org/judge", "sigmoid": True, "gate": "right"},
                {"path": "x/", "name": "other", "standardise": True, "cap": 1.0, "clip": [-2.0, 0.0]},
            ],
            "overlong": {"buffer_tokens": 4, "weight": 2.0},
            "format": {"pattern": "a+"},
        }
    )
    assert part_rules(config) == (
        PartRule("right", 0.5),
        PartRule("judge", sigmoid=True, gate="right"),
        PartRule("other", standardise=True, cap=1.0, clip=(-2.0, 0.0)),
        PartRule("overlong", 2.0, shaping=True),
        PartRule("format", 1.0, shaping=True),
    )
