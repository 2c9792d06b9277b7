"""How long the vLLM engine waits for an answer, by a clock of the test's own."""

import asyncio
from types import SimpleNamespace

import pytest

from asyncrl.rollout.engines.base import EngineError
from asyncrl.rollout.engines.vllm import engine as module

TIMEOUT_S = 120.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.asked = 0

    def monotonic(self) -> float:
        self.asked += 1
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "HEALTH_POLL_S", 0.001)
    return clock


def make_engine():
    return module.VllmEngine(
        SimpleNamespace(errored=False),
        SimpleNamespace(vocab_size=8),
        capacity=1,
        max_length=8,
        answer_timeout_s=TIMEOUT_S,
    )


async def wait_while_others_generate(clock, *, queues):
    """An answer that comes after five times 100 s, with a token of another request in each."""
    engine = make_engine()
    answer = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(engine._answer(answer, "to score", queues=queues))
    for _ in range(5):
        clock.now_s += 100
        engine._count(1)
        polls = clock.asked + 2
        while clock.asked < polls and not waiting.done():
            await asyncio.sleep(0)
    if not waiting.done():
        answer.set_result("scores")
    return await waiting


def test_what_queues_is_not_late_while_others_generate(clock):
    assert asyncio.run(wait_while_others_generate(clock, queues=True)) == "scores"


def test_what_does_not_queue_is(clock):
    with pytest.raises(EngineError, match="asked to score and has not answered within 120 s"):
        asyncio.run(wait_while_others_generate(clock, queues=False))


def test_what_queues_behind_requests_that_have_stopped_is_late(clock):
    async def scenario():
        engine = make_engine()
        answer = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(engine._answer(answer, "to score", queues=True))
        while not clock.asked:
            await asyncio.sleep(0)
        clock.now_s += TIMEOUT_S + 1
        await waiting

    with pytest.raises(EngineError, match="has not answered within 120 s"):
        asyncio.run(scenario())
