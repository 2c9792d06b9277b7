"""The paced engine keeps to its schedule, on a virtual clock."""

import asyncio

import numpy as np
import pytest
from virtual_clock import run_virtual

from asyncrl.core.records import FinishReason, VersionSpan
from asyncrl.rollout.engines.base import EngineError, GenerationRequest, SamplingParams
from asyncrl.rollout.engines.paced.engine import LOGPROB, PacedEngine

BASE_S, EACH_S = 0.010, 0.001


class Version:
    """A weight version that takes no reading."""

    def __init__(self, version: int) -> None:
        self.version = version

    def tensors(self) -> dict:
        return {}


def paced(capacity: int = 4, **settings) -> PacedEngine:
    settings = {"step_base_s": BASE_S, "step_per_request_s": EACH_S, **settings}
    return PacedEngine(capacity=capacity, **settings)


def request(name: str, new_tokens: int, seed: int = 0) -> GenerationRequest:
    return GenerationRequest(name, np.array([1, 2], np.int32), SamplingParams(new_tokens, seed=seed))


def fixed(name: str, tokens: int) -> tuple[PacedEngine, GenerationRequest]:
    return paced(min_new_tokens=tokens), request(name, tokens)


async def ended(engine: PacedEngine, *requests: GenerationRequest) -> list[float]:
    """Times on the loop's clock at which the requests end, submitted together."""

    async def one(r: GenerationRequest) -> float:
        async for _ in engine.generate(r):
            pass
        return asyncio.get_running_loop().time()

    return await asyncio.gather(*map(one, requests))


def driven(engine: PacedEngine, scenario, lateness_s: float = 0.0):
    async def main():
        running = asyncio.create_task(engine.run())
        try:
            return await scenario
        finally:
            running.cancel()

    return run_virtual(main(), lateness_s)


def test_a_request_takes_its_steps():
    engine, r = fixed("r", 100)
    (end_s,), _ = driven(engine, ended(engine, r))
    assert end_s == pytest.approx(100 * (BASE_S + EACH_S))
    assert engine._busy_s == pytest.approx(end_s)


def lengths(engine: PacedEngine, requests: list[GenerationRequest]) -> list[int]:
    return [engine._draw_length(r.request_id, r.sampling) for r in requests]


def stepwise_ends(needs: list[int], capacity: int) -> list[float]:
    """The same schedule the slow way: one step after the other."""
    waiting, running, ends, now_s = list(enumerate(needs)), {}, [0.0] * len(needs), 0.0
    while waiting or running:
        while waiting and len(running) < capacity:
            index, need = waiting.pop(0)
            running[index] = need
        now_s += BASE_S + EACH_S * len(running)
        for index in list(running):
            running[index] -= 1
            if running[index] == 0:
                ends[index] = now_s
                del running[index]
    return ends


@pytest.mark.parametrize("capacity", [1, 3, 50])
def test_batching_equals_a_stepwise_simulation(capacity):
    engine = paced(capacity)
    requests = [request(f"r{i}", 60, seed=i) for i in range(40)]
    needs = lengths(engine, requests)
    assert len(set(needs)) > 15
    ends, loop = driven(engine, ended(engine, *requests))
    assert ends == pytest.approx(stepwise_ends(needs, capacity))
    assert loop.wakeups <= len(requests) + 1  # once per end, not once per step
    assert engine._generated_tokens == sum(needs)


def test_late_wakeups_do_not_lengthen_the_schedule():
    """Every wake-up 4 ms late: the last end is 4 ms late, not 40 times that."""
    requests = [request(f"r{i}", 60, seed=i) for i in range(40)]
    punctual, _ = driven(engine := paced(3), ended(engine, *requests))
    late, _ = driven(engine := paced(3), ended(engine, *requests), lateness_s=0.004)
    assert max(late) - max(punctual) == pytest.approx(0.004)


def test_an_arrival_joins_at_the_next_step_boundary():
    engine = paced(min_new_tokens=10)

    async def scenario():
        first = asyncio.create_task(ended(engine, request("a", 10)))
        await asyncio.sleep(0.025)  # in the third step of 11 ms
        second = asyncio.create_task(ended(engine, request("b", 10)))
        return (await first)[0], (await second)[0]

    (first_s, second_s), _ = driven(engine, scenario())
    assert first_s == pytest.approx(3 * 0.011 + 7 * 0.012)
    assert second_s == pytest.approx(first_s + 3 * 0.011)


def test_what_arrives_before_the_engine_woke_did_not_arrive_earlier():
    """The slot is free since 0.110 s, but the request came at 0.114 s: it runs from then on."""
    engine = paced(1, min_new_tokens=10)

    async def scenario() -> list[int]:
        loop = asyncio.get_running_loop()
        engine.generate(request("a", 10))
        engine.stats()
        loop.now_s = 0.114
        engine.generate(request("b", 10))
        running = []
        for loop.now_s in (0.2235, 0.2245):
            running.append(engine.stats().running)
        return running

    assert run_virtual(scenario())[0] == [1, 0]


def test_tokens_are_stamped_by_the_step_that_sampled_them():
    engine = paced(min_new_tokens=10)

    async def scenario():
        chunk = asyncio.ensure_future(anext(engine.generate(request("r", 10))))
        await asyncio.sleep(0.030)  # the third step is under way: it still belongs to version 0
        report = await engine.update_weights(Version(1))
        assert report.version == engine.stats().version == 1
        await asyncio.sleep(0.070 - 0.030)
        await engine.update_weights(Version(2))
        first = await chunk
        late = await anext(engine.generate(request("late", 10)))
        return first, late

    (first, late), _ = driven(engine, scenario())
    assert first.versions == (VersionSpan(0, 3, 0), VersionSpan(3, 4, 1), VersionSpan(7, 3, 2))
    assert late.versions == (VersionSpan(0, 10, 2),)
    assert first.token_ids.dtype == np.int32 and len(first.token_ids) == 10
    assert (first.logprobs == LOGPROB).all() and first.logprobs.dtype == np.float32


def test_versions_are_forgotten_when_no_request_needs_them():
    engine = paced(min_new_tokens=5)

    async def scenario():
        for version in range(1, 300):
            await engine.update_weights(Version(version))
            await anext(engine.generate(request("r", 5)))

    driven(engine, scenario())
    assert len(engine._versions) <= 3


def test_lengths_are_uniform_and_depend_on_the_seed():
    engine = paced(min_new_tokens=3)
    drawn = lengths(engine, [request("r", 12, seed=s) for s in range(2000)])
    assert drawn == lengths(engine, [request("r", 12, seed=s) for s in range(2000)])
    counts = np.bincount(drawn, minlength=13)[3:]
    assert len(counts) == 10
    assert ((counts - 200.0) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees of freedom, 0.1%


def test_lengths_with_a_mean_have_a_heavy_tail_and_two_ends():
    engine, n = paced(min_new_tokens=20, mean_new_tokens=100), 4000
    lengths = [engine.draw_length(1000, i) for i in range(n)]
    assert lengths == [engine.draw_length(1000, i) for i in range(n)]
    assert 95 < sum(lengths) / n < 105
    assert 600 < max(lengths) <= 1000
    assert min(lengths) == 20
    assert engine.draw_length(50, lengths.index(max(lengths))) == 50


def test_no_request_ends_before_its_own_minimum():
    engine = paced()
    shortest = [
        engine._draw_length("r", SamplingParams(8, seed=seed, min_new_tokens=6)) for seed in range(100)
    ]
    assert set(shortest) == {6, 7, 8}


def test_finish_reasons():
    engine = paced(min_new_tokens=1)
    requests = [request(f"r{s}", 3, seed=s) for s in range(12)]

    async def scenario():
        return await asyncio.gather(*[anext(engine.generate(r)) for r in requests])

    chunks, _ = driven(engine, scenario())
    reasons = {(len(c.token_ids) == 3, c.finish_reason) for c in chunks}
    assert reasons == {(True, FinishReason.LENGTH), (False, FinishReason.STOP)}


def test_abort():
    engine = paced(1, min_new_tokens=10)

    async def scenario():
        running = asyncio.ensure_future(anext(engine.generate(request("running", 10))))
        waiting = asyncio.ensure_future(anext(engine.generate(request("waiting", 10))))
        await asyncio.sleep(0.040)
        engine.abort("waiting")
        engine.abort("running")
        engine.abort("nobody")
        assert engine.stats().running == engine.stats().waiting == 0
        after = await anext(engine.generate(request("after", 10)))
        return await running, await waiting, after

    (running, waiting, after), _ = driven(engine, scenario())
    assert running.finish_reason is waiting.finish_reason is FinishReason.ABORT
    assert (len(running.token_ids), len(waiting.token_ids), len(after.token_ids)) == (3, 0, 10)


def test_a_cancelled_consumer_frees_its_slot():
    engine = paced(1, min_new_tokens=10)

    async def scenario():
        gone = asyncio.ensure_future(anext(engine.generate(request("gone", 10))))
        await asyncio.sleep(0.005)
        gone.cancel()
        await asyncio.wait({gone})
        return await ended(engine, request("next", 10))

    (end_s,), _ = driven(engine, scenario())
    assert end_s == pytest.approx(0.005 + 10 * 0.011)


def test_steps_that_take_no_time():
    engine = paced(2, step_base_s=0.0, step_per_request_s=0.0)
    ends, _ = driven(engine, ended(engine, *[request(f"r{i}", 20, seed=i) for i in range(9)]))
    assert ends == [0.0] * 9


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (GenerationRequest("bad", np.array([], np.int32), SamplingParams(5)), "empty prompt"),
        (request("bad", 2), "min_new_tokens=3"),
    ],
)
def test_impossible_requests_are_refused_at_once(bad, says):
    engine = paced(min_new_tokens=3)

    async def scenario():
        with pytest.raises(ValueError, match=says):
            engine.generate(bad)

    driven(engine, scenario())


def test_a_failed_update_leaves_the_version():
    engine = paced()

    class Broken(Version):
        def tensors(self) -> dict:
            raise OSError("torn")

    async def scenario():
        with pytest.raises(OSError, match="torn"):
            await engine.update_weights(Broken(1))
        return engine.stats().version

    version, _ = driven(engine, scenario())
    assert version == 0


def test_close_ends_everything():
    engine = paced()

    async def scenario():
        running = asyncio.create_task(engine.run())
        stream = engine.generate(request("r", 50))
        await asyncio.sleep(0.001)
        await engine.close()
        for wait in (running, anext(stream)):
            with pytest.raises(EngineError, match="closed"):
                await wait

    run_virtual(scenario())
