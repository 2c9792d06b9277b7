"""What becomes of a task on a rollout worker, with a real engine."""

import asyncio

import pytest

from asyncrl.config import RewardConfig
from asyncrl.reward.rewards import Rewards
from asyncrl.reward.score import RewardError
from asyncrl.rollout.engines.base import SamplingParams
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.rollout.group import AttemptFailed, GroupRollout
from asyncrl.rollout.task import RolloutTask

GROUP, LONGEST = 8, 24


def letters(token_ids):
    """One letter a token."""
    return "".join(chr(ord("a") + i % 26) for i in token_ids)


class Judge:
    """A reward model that scores by length, and notes how many responses were still being sampled."""

    def __init__(self, engine, fails_on=None):
        self.engine = engine
        self.fails_on = fails_on
        self.still_running = []

    async def score(self, prompt, response):
        self.still_running.append(self.engine.stats().running)
        if len(self.still_running) == self.fails_on:
            raise RewardError("judge", "the score is nan", 1, kind="model")
        return float(len(response))

    def drain_metrics(self):
        return {}


async def roll_out(make_qwen3, **judge):
    engine = TorchEngine(make_qwen3(vocab_size=16), capacity=GROUP, max_length=64)
    judge = Judge(engine, **judge)
    sampling = SamplingParams(max_new_tokens=LONGEST, stop_token_ids=(1,))
    rewards = Rewards(
        RewardConfig.model_validate({"models": [{"path": "judge"}]}),
        {"judge": judge},
        max_steps=1,
        max_tokens=LONGEST,
    )
    rollout = GroupRollout(engine, rewards, letters, seed=3, group_size=GROUP)
    driving = asyncio.create_task(engine.run())
    try:
        task = RolloutTask(0, 0, 0, 0, "say", [5, 6], {}, GROUP, sampling)
        return await rollout.score(task, await rollout.generate(task)), judge
    finally:
        await engine.close()
        await asyncio.gather(driving, return_exceptions=True)


def test_a_response_is_scored_while_its_siblings_are_still_sampled(make_qwen3):
    group, judge = asyncio.run(roll_out(make_qwen3))
    assert len({t.sampled_tokens for t in group.trajectories}) > 1, "all responses are of one length"
    assert judge.still_running[0] > 0
    assert judge.still_running[-1] == 0
    for trajectory in group.trajectories:
        assert trajectory.reward == trajectory.reward_parts["judge"] == trajectory.sampled_tokens


def test_a_score_that_fails_fails_the_attempt_with_all_its_tokens_counted(make_qwen3):
    whole, _ = asyncio.run(roll_out(make_qwen3))
    with pytest.raises(AttemptFailed) as caught:
        asyncio.run(roll_out(make_qwen3, fails_on=1))
    assert caught.value.reason == "reward model `judge`: the score is nan"
    assert caught.value.sampled_tokens == sum(t.sampled_tokens for t in whole.trajectories)
