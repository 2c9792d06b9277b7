"""How much of the time evaluation takes beside a training, on a virtual clock."""

import asyncio
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from virtual_clock import run_virtual

from asyncrl.config import RewardConfig, RewardModelConfig, RolloutConfig
from asyncrl.data.prompts import Prompt
from asyncrl.evaluation.evaluator import _Link
from asyncrl.evaluation.host import EvaluationHost
from asyncrl.evaluation.share import BURST_S, Share
from asyncrl.loop.algorithm import roll_out
from asyncrl.reward.rewards import Rewards
from asyncrl.rollout.engines.paced.engine import PacedEngine
from asyncrl.rollout.group import GroupRollout

VERSION, PROMPTS, SLOTS, TOKENS = 3, 160, 8, 32
ROUND_S = PROMPTS / SLOTS * TOKENS * 0.05
"""Of a round that nothing keeps back."""


class Same:
    """A reward model."""

    async def score(self, prompt, response):
        return 1.0

    def drain_metrics(self):
        return {}


def a_round(share, over_at_s=float("inf")):
    """Its seconds, those in which the engine had requests, and when prompts were leased."""
    leased_s = []

    async def main():
        clock = asyncio.get_running_loop().time
        scored = RewardConfig(models=[RewardModelConfig(path="same")])
        engine = PacedEngine(capacity=SLOTS, step_base_s=0.05, step_per_request_s=0.0, min_new_tokens=TOKENS)
        driving = asyncio.create_task(engine.run())
        await engine.update_weights(SimpleNamespace(version=VERSION, tensors=dict, canary=None))
        rewards = Rewards(scored, {"same": Same()}, max_steps=1, max_tokens=TOKENS, may_grow=False)
        rollout = GroupRollout(
            engine, rewards, lambda ids: "", seed=0, group_size=1, context_tokens=TOKENS + 2
        )
        prompts = [Prompt(i, f"{i}", np.array([i], np.int32), {}) for i in range(PROMPTS)]
        changed = asyncio.Event()
        config = RolloutConfig(group_size=1, max_new_tokens=TOKENS)
        host = EvaluationHost(VERSION, prompts, config, changed.set)
        limit = Share(share, lambda: engine.stats().busy_s, lambda: clock() >= over_at_s)

        async def turn():
            await limit.turn()
            leased_s.append(clock())

        await roll_out(rollout, _Link(host, changed, VERSION, turn))
        driving.cancel()
        assert len(host.groups) == PROMPTS and not host.failed
        return clock(), engine.stats().busy_s

    (took_s, busy_s), _ = run_virtual(main())
    return took_s, busy_s, leased_s


def test_without_a_limit_nothing_is_kept_back():
    took_s, busy_s, _ = a_round(1.0)
    assert took_s == pytest.approx(ROUND_S, rel=0.1)
    assert busy_s == pytest.approx(took_s, rel=0.05)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_it_keeps_to_its_share_and_yet_fills_its_slots(share):
    took_s, busy_s, leased_s = a_round(share)
    at_once_s = BURST_S + TOKENS * 0.05
    assert busy_s <= share * took_s + at_once_s
    assert took_s >= ROUND_S / share - at_once_s / share
    assert busy_s <= 1.4 * ROUND_S  # prompts are taken together
    rests = [b - a for a, b in itertools.pairwise(leased_s)]
    assert max(rests) > BURST_S / share - 1


def test_once_nothing_trains_any_more_it_takes_all():
    took_s, _, leased_s = a_round(0.01, over_at_s=60.0)
    assert took_s < 60 + 1.2 * ROUND_S
    assert not any(10 < at_s < 60 for at_s in leased_s)
