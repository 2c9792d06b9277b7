"""The embedded engine beyond the conformance suite: stepping by hand, sharing, swaps, failures, memory."""

import asyncio
import sys
import threading
import weakref
from collections import defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from engine_reference import collect, recomputed, stitched, versions_of_keys

from asyncrl.core.records import FinishReason
from asyncrl.rollout.engines.base import EngineError, GenerationRequest, SamplingParams
from asyncrl.rollout.engines.torch import thread as engine_thread
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.weights.source import LocalWeights, WeightsError

pytestmark = pytest.mark.usefixtures("one_thread")


def request(name: str, prompt: list[int], new_tokens: int = 8, **sampling) -> GenerationRequest:
    return GenerationRequest(name, np.asarray(prompt, np.int32), SamplingParams(new_tokens, **sampling))


def copies(model) -> dict[str, torch.Tensor]:
    return dict(LocalWeights(0, model.state_dict()).tensors())


async def finish(engine: TorchEngine) -> None:
    while engine.stats().running + engine.stats().waiting:
        engine.step()
        await asyncio.sleep(0)


def record_fills(engine: TorchEngine, monkeypatch) -> list[int]:
    """The number of rows of each prefill, as they come."""
    decoder = engine._batch._decoder
    fill, fills = decoder.fill, []
    monkeypatch.setattr(decoder, "fill", lambda rows, *what: (fills.append(len(rows)), fill(rows, *what))[1])
    return fills


def test_a_group_costs_one_prefill_even_when_its_members_start_one_by_one(make_qwen3, monkeypatch):
    engine = TorchEngine(make_qwen3(), capacity=2, max_length=64)
    fills = record_fills(engine, monkeypatch)

    async def scenario():
        streams = [engine.generate(request(f"r{i}", [5, 6, 7, 8], 3 + i, seed=i)) for i in range(6)]
        await finish(engine)
        return [await anext(stream) for stream in streams]

    assert [len(chunk.token_ids) for chunk in asyncio.run(scenario())] == [3, 4, 5, 6, 7, 8]
    assert fills == [1]


def conversations(rng, answers):
    """The next request of each of some conversations: its last answer and a few new tokens, sometimes with
    history rewritten, sometimes the very prompt again."""
    for name, (turn, prompt, chunk) in answers.items():
        if chunk is not None and rng.random() < 0.9:
            shown = rng.integers(2, 90, rng.integers(0, 5))
            answer = chunk.token_ids if rng.random() < 0.8 else chunk.token_ids[: rng.integers(0, 4)]
            prompt = np.concatenate([prompt, answer, shown]).astype(np.int32)
        new_tokens = int(rng.integers(1, 9))
        yield (
            name,
            turn + 1,
            request(f"{name}/{turn + 1}", prompt.tolist(), new_tokens, seed=int(rng.integers(99))),
        )


@pytest.mark.parametrize(("capacity", "spare"), [(2, 0), (3, 2), (2, 6)])
@pytest.mark.parametrize("kv_on_update", ["keep", "recompute"])
def test_turns_go_on_from_the_earlier_ones_exactly(make_qwen3, kv_on_update, capacity, spare):
    """Six conversations in two to eight rows, and updates before, in and after their turns: whatever lies
    where, every token has the log-probability that a plain forward gives it, in which kept keys are those of
    the weights that computed them."""
    models = [make_qwen3(seed=i) for i in range(3)]
    rows = {"capacity": capacity, "spare": spare, "kv_on_update": kv_on_update}
    engine, rng = TorchEngine(make_qwen3(), max_length=160, **rows), np.random.default_rng(0)
    reused: dict[bool, list[int]] = {True: [], False: []}

    async def scenario():
        prompts = [rng.integers(2, 90, rng.integers(2, 12)) for _ in range(6)]
        answers = {i: (0, prompt.astype(np.int32), None) for i, prompt in enumerate(prompts)}
        born: dict[int, int] = {}
        since: dict[int, int] = {}
        known: dict[int, list[tuple[list[int], list[int]]]] = defaultdict(list)
        """Of each conversation, what may be gone on from: tokens, and the versions of their keys."""

        def update():
            version = engine.stats().version + 1
            engine.swap(copies(models[version % 3]), version)

        for _ in range(6):
            asked = [(*who, replace(r, since=since.get(who[0]))) for *who, r in conversations(rng, answers)]
            rng.shuffle(asked)
            streams = [(name, turn, r, engine.generate(r)) for name, turn, r in asked]
            if rng.random() < 0.25:
                engine.step()
                update()
            await finish(engine)
            for name, turn, r, stream in streams:
                output = await collect(stream)
                check(models, r, output, known[name], keeps=kv_on_update == "keep")
                if turn > 1:
                    reused[born[name] == output.versions[0]].append(output.reused)
                born[name] = output.versions[-1]
                since.setdefault(name, output.versions[0])
                chunk = SimpleNamespace(token_ids=np.asarray(output.ids))
                answers[name] = turn, r.prompt_ids, chunk
            if rng.random() < 0.3:
                update()

    asyncio.run(scenario())
    assert reused[False]
    assert any(reused[False]) is (kv_on_update == "keep")
    used = reused[True] + reused[False] if kv_on_update == "keep" else reused[True]
    assert sum(map(bool, used)) >= len(used) / 2 or capacity + spare < 6


def check(models, request, output, known, *, keeps: bool) -> None:
    by_version = {version: models[version % 3] for version in range(20)}
    if not keeps:
        np.testing.assert_allclose(output.logprobs, recomputed(by_version, request, output), atol=1e-4)
        return
    beginning = request.prompt_ids[: output.reused].tolist()
    keys = next(keys for ids, keys in reversed(known) if ids[: output.reused] == beginning) if known else []
    np.testing.assert_allclose(output.logprobs, stitched(by_version, request, output, keys), atol=1e-4)
    ids = [*request.prompt_ids.tolist(), *output.ids[:-1]]
    known.append((ids, versions_of_keys(request, output, keys)))


def test_what_an_update_has_passed_through_is_never_gone_on_from(make_qwen3):
    """Its keys and values are of two versions, and stay so until its end and after it."""
    engine = TorchEngine(make_qwen3(), capacity=2, spare=2, max_length=64)

    async def scenario():
        first = engine.generate(request("first", [5, 6, 7], 6))
        engine.step()
        engine.swap(copies(make_qwen3(seed=1)), 1)
        await finish(engine)
        answer = await anext(first)
        second = engine.generate(request("second", [5, 6, 7, *answer.token_ids, 9], 3))
        await finish(engine)
        chunk = await anext(second)
        third = engine.generate(request("third", [5, 6, 7, *answer.token_ids, 9, *chunk.token_ids, 9], 3))
        await finish(engine)
        return chunk.reused, (await anext(third)).reused

    assert asyncio.run(scenario()) == (0, 3 + 6 + 1 + 3 - 1)


def test_what_begins_waits_for_the_later_turns_of_what_has_begun(make_qwen3):
    engine = TorchEngine(make_qwen3(), capacity=1, max_length=64)
    ended = []

    async def one(name, since):
        await anext(engine.generate(replace(request(name, [5, 6, 7], 2), since=since)))
        ended.append(name)

    async def scenario():
        asked = {"runs": None, "new": None, "turn": 0, "newer": None, "next turn": 0}
        async with asyncio.TaskGroup() as tasks:
            for name, since in asked.items():
                tasks.create_task(one(name, since))
            await asyncio.sleep(0)
            await finish(engine)

    asyncio.run(scenario())
    assert ended == ["turn", "next turn", "runs", "new", "newer"]


@pytest.mark.parametrize("is_given_up", [True, False])
def test_what_nobody_goes_on_from_makes_place_first(make_qwen3, is_given_up):
    """Two contexts have room, and a third comes: the older of them goes, or the one that is given up."""
    engine = TorchEngine(make_qwen3(), capacity=1, spare=1, max_length=64)

    async def one(name, prompt):
        stream = engine.generate(request(name, prompt, 3))
        await finish(engine)
        return await anext(stream)

    async def scenario():
        kept = await one("kept", [5, 6, 7])
        await one("over", [8, 9, 10])
        if is_given_up:
            engine.abort("over")
        await one("new", [11, 12, 13])
        return (await one("kept/1", [5, 6, 7, *kept.token_ids, 9])).reused

    assert asyncio.run(scenario()) == (3 + 3 - 1 if is_given_up else 0)


def test_what_it_forgets_leaves_no_trace(make_qwen3):
    """To the bit: as an interrupted `inline` run goes on."""

    def last(before: list[list[int]]):
        engine = TorchEngine(make_qwen3(), capacity=3, spare=2, max_length=64)

        async def scenario():
            for i, prompt in enumerate(before):
                engine.generate(request(f"before {i}", prompt, 3))
            await finish(engine)
            engine.forget()
            stream = engine.generate(request("last", [5, 6, 7, 8], 9))
            await finish(engine)
            return await anext(stream)

        return asyncio.run(scenario())

    alone, after = last([]), last([[5, 6, 7, 8], [5, 6], [9] * 7])
    assert after.token_ids.tolist() == alone.token_ids.tolist()
    assert after.logprobs.tobytes() == alone.logprobs.tobytes()
    assert after.reused == 0


@pytest.mark.parametrize("kv_on_update", ["keep", "recompute", None])
def test_a_prompt_is_not_found_where_another_row_was_moved_to(make_qwen3, kv_on_update):
    """The first of two rows ends and the second takes its place, before or in an update: the first prompt is
    gone."""

    def scenario_of(requests, update):
        engine = TorchEngine(make_qwen3(), capacity=3, max_length=64, kv_on_update=kv_on_update or "keep")

        async def scenario():
            streams = [engine.generate(r) for r in requests[:-1]]
            for _ in range(3):
                engine.step()
            if update:
                engine.swap(copies(make_qwen3(seed=1)), 1)
            else:
                engine.step()
            streams.append(engine.generate(requests[-1]))
            await finish(engine)
            return [await anext(stream) for stream in streams]

        return asyncio.run(scenario())[-1]

    first, second = [5, 6, 7, 8, 9], [15, 16, 17, 18, 19]
    ends, runs, comes = request("ends", first, 3), request("runs", second, 20), request("comes", first, 9)
    update = kv_on_update is not None
    chunk, alone = scenario_of([ends, runs, comes], update), scenario_of([comes], update)
    assert chunk.token_ids.tolist() == alone.token_ids.tolist()
    assert np.abs(chunk.logprobs - alone.logprobs).max() < 1e-4


def test_the_prefill_budget_holds_back_new_requests(make_qwen3, monkeypatch):
    engine = TorchEngine(make_qwen3(), capacity=4, max_length=64, prefill_tokens=20)
    fills = record_fills(engine, monkeypatch)

    async def scenario():
        for i in range(4):
            engine.generate(request(f"r{i}", [10 + i] * 11, 8))
        engine.step()
        assert (engine.stats().running, engine.stats().waiting) == (2, 2)
        engine.step()
        assert (engine.stats().running, engine.stats().waiting) == (4, 0)
        await finish(engine)

    asyncio.run(scenario())
    assert fills == [2, 2]


@pytest.mark.parametrize("tie", [True, False])
def test_swap_adopts_the_tensors_and_keeps_ties(make_qwen3, tie):
    model, new = make_qwen3(tie=tie), make_qwen3(seed=1, tie=tie)
    engine = TorchEngine(model, capacity=2, max_length=64)
    tensors = copies(new)
    assert ("lm_head.weight" in tensors) is not tie
    pause_s = engine.swap(tensors, 7)
    assert pause_s > 0
    assert engine.stats().version == 7
    assert model.model.embed_tokens.weight.data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    same = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert same is tie
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, new(ids, use_cache=False).logits)


def test_a_tied_tensor_given_twice_is_refused(make_qwen3):
    model = make_qwen3()
    engine = TorchEngine(model, capacity=2, max_length=64)
    twice = {name: tensor.clone() for name, tensor in make_qwen3(seed=1).state_dict().items()}
    before = model.lm_head.weight.clone()
    with pytest.raises(WeightsError, match=r"lm_head\.weight"):
        engine.swap(twice, 1)
    assert engine.stats().version == 0
    assert torch.equal(model.lm_head.weight, before)


def test_weights_that_give_nan_break_the_engine_and_say_so(make_qwen3):
    engine = TorchEngine(make_qwen3(), capacity=2, max_length=64)
    bad = copies(make_qwen3())
    bad["model.norm.weight"].fill_(float("nan"))

    async def scenario():
        running = asyncio.create_task(engine.run())
        streams = [engine.generate(request(f"r{i}", [3, 4], 30)) for i in range(3)]
        engine.swap(bad, 5)
        with pytest.raises(EngineError, match="version 5 give"):
            await running
        for stream in streams:
            with pytest.raises(EngineError, match="version 5 give"):
                await anext(stream)
        with pytest.raises(EngineError):
            engine.generate(request("later", [3]))
        with pytest.raises(EngineError):
            engine.step()
        with pytest.raises(EngineError):
            await engine.update_weights(LocalWeights(6, make_qwen3().state_dict()))

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_step_that_raises_breaks_the_engine(make_qwen3, monkeypatch):
    engine = TorchEngine(make_qwen3(), capacity=2, max_length=64)

    def explode(*args):
        raise MemoryError("no more of it")

    async def scenario():
        stream = engine.generate(request("r", [3, 4]))
        monkeypatch.setattr(engine._batch._decoder, "decode", explode)
        with pytest.raises(EngineError, match="MemoryError: no more of it"):
            engine.step()
        with pytest.raises(EngineError, match="MemoryError"):
            await anext(stream)

    asyncio.run(scenario())


def test_a_recomputation_that_fails_half_way_breaks_the_engine(make_qwen3, monkeypatch):
    engine = TorchEngine(make_qwen3(), capacity=2, max_length=64, kv_on_update="recompute")

    def explode(*args):
        raise MemoryError("no more of it")

    async def scenario():
        stream = engine.generate(request("r", [3, 4]))
        engine.step()
        monkeypatch.setattr(engine._batch._decoder, "fill", explode)
        with pytest.raises(EngineError, match="version 3 failed half-way"):
            engine.swap(copies(make_qwen3(seed=1)), 3)
        with pytest.raises(EngineError, match="half-way"):
            await anext(stream)

    asyncio.run(scenario())


def test_recomputing_in_several_forwards_equals_one(make_qwen3, monkeypatch):
    def outputs(prefill_tokens: int):
        engine = TorchEngine(make_qwen3(), capacity=6, max_length=64, kv_on_update="recompute")

        async def scenario():
            streams = [
                engine.generate(request(f"r{i}", list(range(2, 3 + 3 * i)), 30, seed=i)) for i in range(6)
            ]
            engine.step()
            assert engine.stats().running == 6
            engine._batch._prefill_tokens = prefill_tokens
            fills = record_fills(engine, monkeypatch)
            engine.swap(copies(make_qwen3(seed=1)), 1)
            await finish(engine)
            return fills, [await anext(stream) for stream in streams]

        return asyncio.run(scenario())

    one, whole = outputs(4096)
    several, split = outputs(40)
    assert one == [6]
    assert len(several) > 1 and sum(several) == 6
    for a, b in zip(whole, split, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert np.abs(a.logprobs - b.logprobs).max() < 1e-4


def test_overlapping_updates_apply_in_order(make_qwen3):
    models = [make_qwen3(seed=i) for i in range(4)]
    engine = TorchEngine(make_qwen3(), capacity=2, max_length=64)

    async def scenario():
        updates = [engine.update_weights(LocalWeights(v, models[v].state_dict())) for v in (1, 2, 3)]
        return await asyncio.gather(*updates)

    assert [report.version for report in asyncio.run(scenario())] == [1, 2, 3]
    assert engine.stats().version == 3


@pytest.mark.parametrize("kv_on_update", ["keep", "recompute"])
def test_two_hundred_updates_leave_no_memory_behind(make_qwen3, kv_on_update):
    """A version that stayed would be 1.2 MB a time; 180 of them 220 MB."""
    new = make_qwen3(seed=1, hidden=128)
    megabyte = 1 << 20
    assert megabyte < sum(p.nbytes for p in new.parameters())
    engine = TorchEngine(make_qwen3(hidden=128), capacity=4, max_length=256, kv_on_update=kv_on_update)

    async def scenario() -> int:
        process = psutil.Process()
        before = 0
        for i in range(4):
            engine.generate(request(f"r{i}", [3 + i] * 20, 230, seed=i))
        for version in range(200):
            engine.step()
            await engine.update_weights(LocalWeights(version, new.state_dict()))
            if version == 20:
                before = process.memory_info().rss
        await finish(engine)
        return process.memory_info().rss - before

    assert asyncio.run(scenario()) < 40 * megabyte


def test_settings_that_cannot_work_are_refused(make_qwen3):
    with pytest.raises(ValueError, match="capacity=0"):
        TorchEngine(make_qwen3(), capacity=0, max_length=64)


@pytest.mark.parametrize("capacity", [1, 3])
@pytest.mark.parametrize("max_length", [2, 3, 5])
def test_small_engines_work(make_qwen3, capacity, max_length):
    engine = TorchEngine(make_qwen3(), capacity=capacity, max_length=max_length)

    async def scenario():
        streams = [engine.generate(request(f"r{i}", [4], max_length - 1)) for i in range(4)]
        await finish(engine)
        return [await anext(stream) for stream in streams]

    assert [len(chunk.token_ids) for chunk in asyncio.run(scenario())] == [max_length - 1] * 4


def test_closing_a_stream_that_nobody_iterates_frees_its_slot(make_qwen3):
    engine = TorchEngine(make_qwen3(), capacity=1, max_length=64)

    async def scenario():
        stream = engine.generate(request("r", [4], 30))
        engine.step()
        await stream.aclose()
        assert engine.stats().running == 0
        assert [chunk async for chunk in stream] == []

    asyncio.run(scenario())


# ---- in its own thread -------------------------------------------------------------------------------------


class Gate:
    """Lets a running engine's steps through one by one."""

    def __init__(self, engine: TorchEngine, monkeypatch) -> None:
        self.let, self.reached = threading.Semaphore(0), threading.Semaphore(0)
        step = engine._batch.step

        def gated():
            self.reached.release()
            assert self.let.acquire(timeout=60)
            return step()

        monkeypatch.setattr(engine._batch, "step", gated)

    async def arrived(self) -> None:
        """Until a step is about to begin."""
        assert await asyncio.to_thread(self.reached.acquire, timeout=60)

    def open(self) -> None:
        self.let.release(1_000_000)


def in_time(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 60))


def test_the_event_loop_goes_on_during_a_step_and_what_it_asks_comes_after(make_qwen3, monkeypatch):
    """Requests are admitted in the order of the calls, an abort and a swap fall between two steps."""
    engine = TorchEngine(make_qwen3(), capacity=2, max_length=64)
    gate = Gate(engine, monkeypatch)

    async def scenario():
        running = asyncio.create_task(engine.run())
        streams = [engine.generate(request("r0", [3, 4], 3))]
        await gate.arrived()
        streams += [engine.generate(request(f"r{i}", [3 + i], 3)) for i in range(1, 5)]
        engine.abort("r1")
        update = asyncio.create_task(engine.update_weights(LocalWeights(1, make_qwen3(seed=1).state_dict())))
        while engine._thread._orders.qsize() < 6:  # four requests, an abort, a swap
            await asyncio.sleep(0.001)
        assert (engine.stats().waiting, engine.stats().version) == (5, 0)
        with pytest.raises(RuntimeError, match="`run` drives"):
            engine.step()
        ended = []

        async def note(i, stream):
            ended.append((i, await anext(stream)))

        notes = [asyncio.create_task(note(i, stream)) for i, stream in enumerate(streams)]
        gate.let.release()
        assert (await notes[1]) is None and ended[0][1].finish_reason is FinishReason.ABORT
        gate.open()
        assert (await update).version == 1
        await asyncio.gather(*notes)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await running
        return [(i, len(chunk.token_ids), chunk.versions[0].version) for i, chunk in ended[1:]]

    ended = in_time(scenario())
    assert [i for i, _, _ in ended] == [0, 2, 3, 4]
    assert {n for _, n, _ in ended} == {3}
    assert [version for _, _, version in ended] == [0, 1, 1, 1]


def test_closing_during_a_step_waits_for_it_and_leaves_no_thread(make_qwen3, monkeypatch):
    engine = TorchEngine(make_qwen3(), capacity=2, max_length=64)
    gate, others = Gate(engine, monkeypatch), threading.enumerate()

    async def scenario():
        running = asyncio.create_task(engine.run())
        stream = engine.generate(request("r", [3, 4]))
        await gate.arrived()
        closing = asyncio.create_task(engine.close())
        with pytest.raises(EngineError, match="closed"):
            await anext(stream)
        assert not closing.done()
        gate.open()
        await closing
        with pytest.raises(EngineError, match="closed"):
            await running

    in_time(scenario())
    for thread in threading.enumerate():
        if thread.name == "engine" and thread not in others:
            thread.join(timeout=60)
            assert not thread.is_alive()


def test_a_step_that_hangs_does_not_hold_up_the_end(make_qwen3, monkeypatch):
    engine = TorchEngine(make_qwen3(), capacity=2, max_length=64)
    gate = Gate(engine, monkeypatch)
    monkeypatch.setattr("asyncrl.rollout.engines.torch.engine.LAST_STEP_S", 0.05)

    async def scenario():
        running = asyncio.create_task(engine.run())
        engine.generate(request("r", [3, 4]))
        await gate.arrived()
        await engine.close()
        running.cancel()
        with pytest.raises((asyncio.CancelledError, EngineError)):
            await running
        with pytest.raises(EngineError):
            engine.generate(request("later", [3]))
        gate.open()

    in_time(scenario())


def test_an_update_does_not_wait_for_a_step_that_hangs_at_the_end(make_qwen3, monkeypatch):
    model = make_qwen3()
    engine = TorchEngine(model, capacity=2, max_length=64)
    gate = Gate(engine, monkeypatch)
    monkeypatch.setattr("asyncrl.rollout.engines.torch.engine.LAST_STEP_S", 0.05)
    swap, swapping = engine._swap, asyncio.Event()
    monkeypatch.setattr(engine, "_swap", lambda *what: (swapping.set(), swap(*what))[1])

    async def scenario():
        running = asyncio.create_task(engine.run())
        engine.generate(request("r", [3, 4]))
        await gate.arrived()
        updating = asyncio.create_task(engine.update_weights(LocalWeights(1, model.state_dict())))
        await swapping.wait()
        closing = asyncio.create_task(engine.close())
        for waiting in (updating, running):
            with pytest.raises(EngineError, match="closed"):
                await waiting
        await closing
        gate.open()

    in_time(scenario())


def test_the_last_of_several_engines_restores_the_interpreters_switches(make_qwen3, monkeypatch):
    monkeypatch.setattr(engine_thread, "_before_s", [])  # without engines that other tests left hanging
    sys.setswitchinterval(before_s := 0.005)
    engines = [TorchEngine(make_qwen3(), capacity=2, max_length=64) for _ in range(3)]

    async def scenario():
        running = [asyncio.create_task(engine.run()) for engine in engines]
        await asyncio.gather(*(anext(engine.generate(request("r", [3, 4]))) for engine in engines))
        for i, engine in enumerate(engines):  # in the order in which they began
            assert sys.getswitchinterval() < before_s
            await engine.close()
            await asyncio.gather(running[i], return_exceptions=True)

    in_time(scenario())
    assert sys.getswitchinterval() == before_s


def test_a_run_that_was_cancelled_leaves_the_requests_to_the_caller(make_qwen3, monkeypatch):
    engine = TorchEngine(make_qwen3(), capacity=2, max_length=64)
    gate = Gate(engine, monkeypatch)

    async def scenario():
        running = asyncio.create_task(engine.run())
        streams = [engine.generate(request("first", [3, 4], 20))]
        await gate.arrived()
        running.cancel()
        await asyncio.sleep(0)  # the thread has been told to stop
        streams.append(engine.generate(request("late", [3, 5], 20)))
        gate.open()
        await asyncio.wait([running])
        assert running.cancelled()
        assert engine.stats().running + engine.stats().waiting == 2
        await finish(engine)
        return [len((await anext(stream)).token_ids) for stream in streams]

    assert in_time(scenario()) == [20, 20]


def test_what_is_asked_just_when_the_thread_has_ended_is_not_lost(make_qwen3):
    engine = TorchEngine(make_qwen3(), capacity=2, max_length=64)

    async def scenario():
        running = asyncio.create_task(engine.run())
        await asyncio.sleep(0)
        streams = []
        late = request("late", [3, 5], 20)
        engine._thread.ended.add_done_callback(lambda _: streams.append(engine.generate(late)))
        running.cancel()
        await asyncio.wait([running])
        await finish(engine)
        return len((await anext(streams[0])).token_ids)

    assert in_time(scenario()) == 20


def test_an_idle_thread_keeps_nothing_of_its_last_order(make_qwen3):
    """Such as a version of the weights that was copied in place."""
    engine = TorchEngine(make_qwen3(), capacity=2, max_length=64)

    async def scenario():
        running = asyncio.create_task(engine.run())
        await asyncio.sleep(0)
        order = partial(list, [])
        gone = weakref.ref(order)
        engine._do("nothing", order)
        del order
        while gone() is not None:
            await asyncio.sleep(0.001)
        await engine.close()
        await asyncio.wait([running])

    in_time(scenario())
