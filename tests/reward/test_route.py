"""Which parts score which rows."""

import pytest

from asyncrl.config import RewardConfig
from asyncrl.reward.route import RouteError, scoring_parts


def config(**route):
    return RewardConfig.model_validate(
        {
            "functions": [{"function": "a:math"}, {"function": "a:polite"}],
            "models": [{"path": "org/judge"}],
            "route": route,
        }
    )


GRLO = {"column": "reward_model.style", "parts": {"model": ["judge"], "rule": ["math"]}}


def row(style):
    return {"reward_model": {"style": style, "ground_truth": ""}, "ability": "general"}


def test_without_a_route_everything_scores_every_row():
    assert scoring_parts(config(), {}) == ["math", "polite", "judge"]


def test_a_nested_column_chooses_and_what_is_routed_nowhere_scores_every_row():
    assert scoring_parts(config(**GRLO), row("model")) == ["polite", "judge"]
    assert scoring_parts(config(**GRLO), row("rule")) == ["math", "polite"]


def test_numbers_and_booleans_choose_by_their_text():
    assert scoring_parts(config(column="level", parts={"1": ["judge"], "2": ["math"]}), {"level": 2}) == [
        "math",
        "polite",
    ]
    assert "judge" in scoring_parts(config(column="open", parts={"true": ["judge"]}), {"open": True})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, r"it has no column `reward_model.style` \(reward.route.column\)"),
        ({"reward_model": "model"}, "it has no column `reward_model.style`"),
        (row(None), "its `reward_model.style` is None; reward.route.column must hold text"),
        (row("judge"), "is 'judge', which reward.route.parts does not list .it has model, rule."),
    ],
)
def test_a_row_without_a_route_is_refused(columns, message):
    with pytest.raises(RouteError, match=message):
        scoring_parts(config(**GRLO), columns)


def test_a_row_that_nothing_scores_is_refused():
    route = {"column": "kind", "parts": {"none": [], "all": ["math", "polite", "judge"]}}
    with pytest.raises(RouteError, match=r"reward.route.parts.none is empty: nothing scores it"):
        scoring_parts(config(**route), {"kind": "none"})
