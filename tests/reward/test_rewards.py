"""Models, functions and shaping together."""

import asyncio
import math

import pytest
from reward_pools import FUNCTIONS, request

from asyncrl.config import RewardConfig, RewardModelConfig
from asyncrl.reward.model import LocalRewardModel, load_scorer
from asyncrl.reward.rewards import Rewards
from asyncrl.reward.score import RewardError


def config(**settings):
    tree = {
        "functions": [{"function": f"{FUNCTIONS}:length", "weight": 2.0}],
        "models": [{"path": "judge", "weight": 0.5}],
    }
    return RewardConfig.model_validate(tree | settings)


class Fixed:
    """A model that gives one score."""

    def __init__(self, score):
        self._score = score

    async def score(self, prompt, response):
        return self._score

    def drain_metrics(self):
        return {}


async def scores_of(settings, models, asked):
    rewards = Rewards(settings, models, max_steps=1, max_tokens=10)
    await rewards.start()
    try:
        given = [await rewards.score_response(asked.prompt, c, asked.columns) for c in asked.completions]
        return await rewards.score(asked, given)
    finally:
        await rewards.close()


def test_models_functions_and_shaping_add_up(tmp_path, make_reward_model):
    folder = make_reward_model(tmp_path / "judge")
    scorer = load_scorer(RewardModelConfig(path=str(folder), dtype="float32"))
    judge = LocalRewardModel("judge", scorer)
    settings = config(overlong={"buffer_tokens": 8}, format={"pattern": "ab+", "weight": 3.0})
    scores = asyncio.run(scores_of(settings, {"judge": judge}, request(["ab", "xabbb"])))
    judged = [scorer.score([scorer.tokens("say", text)])[0] for text in ("ab", "xabbb")]
    assert [s.parts for s in scores] == [
        {"length": 2.0, "format": 0.0, "judge": judged[0], "overlong": 0.0},
        {"length": 5.0, "format": -1.0, "judge": judged[1], "overlong": -3 / 8},
    ]
    assert scores[0].reward == pytest.approx(2 * 2.0 + 0.5 * judged[0])
    assert scores[1].reward == pytest.approx(2 * 5.0 + 0.5 * judged[1] - 3.0 - 3 / 8)


def test_models_alone_need_no_process():
    settings = config(functions=[])
    (score,) = asyncio.run(scores_of(settings, {"judge": Fixed(4.0)}, request(["a"])))
    assert (score.reward, score.parts) == (2.0, {"judge": 4.0})


def test_a_row_is_scored_by_its_route_only():
    route = {"column": "kind", "parts": {"model": ["judge"], "rule": ["length"]}}
    settings = config(route=route)
    for kind, parts in (("model", {"judge": 4.0}), ("rule", {"length": 1.0})):
        (score,) = asyncio.run(scores_of(settings, {"judge": Fixed(4.0)}, request(["a"], kind=kind)))
        assert score.parts == parts


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_a_failure(score):
    with pytest.raises(RewardError, match=f"reward model `judge` failed .*: the score is {score}"):
        asyncio.run(scores_of(config(), {"judge": Fixed(score)}, request(["a"])))
