"""The limits of a judge: pure arithmetic of the allowance, and the order at the gate."""

import asyncio

import pytest

from asyncrl.config import RewardJudgeConfig
from asyncrl.reward.judges import gate
from asyncrl.reward.judges.gate import BURST_S, Allowance, Gate
from asyncrl.reward.processes.children import Seat


def test_what_is_used_beyond_the_allowance_is_waited_for():
    allowance = Allowance(per_minute=60.0, now_s=100.0)
    assert allowance.wait_s(100.0) == 0.0
    allowance.use(BURST_S + 30)
    assert allowance.wait_s(100.0) == pytest.approx(30.0)
    assert allowance.wait_s(120.0) == pytest.approx(10.0)
    assert allowance.wait_s(130.0) == pytest.approx(0.0)
    # However long nothing is used, no more than a burst is saved up.
    allowance.wait_s(1e6)
    allowance.use(BURST_S + 1)
    assert allowance.wait_s(1e6) == pytest.approx(1.0)


def test_calls_pass_in_their_order_by_the_time_that_the_limit_takes(monkeypatch):
    """Whoever waits, keeps no seat from others; the clock is the test's."""
    now_s, slept = [0.0], []

    async def sleep(seconds):
        slept.append(seconds)
        now_s[0] += seconds

    monkeypatch.setattr(gate.asyncio, "sleep", sleep)
    monkeypatch.setattr(gate.time, "monotonic", lambda: now_s[0])
    judge = RewardJudgeConfig(url="http://x/v1", model="m", requests_per_minute=120, tokens_per_minute=6000)
    passed = []

    async def main():
        seats = asyncio.Semaphore(1)
        the_gate = Gate(judge, share=0.5)

        async def call(name):
            async with Seat(seats) as seat, the_gate.passed(20, seat):
                passed.append((name, now_s[0]))
                the_gate.used(1000.0 if name == "first" else 0.0)

        await asyncio.gather(*map(call, ("first", "second", "third")))

    asyncio.run(main())
    # 50 tokens a second, 500 at once: 1000 are paid for after 10 s, and so are 20 requests at one a second.
    assert passed == [("first", 0.0), ("second", 10.0), ("third", 30.0)]
    assert slept == [10.0, 20.0]
