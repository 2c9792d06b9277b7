"""Weight updates of a real vLLM engine that go wrong, and many that go well."""

import asyncio
import itertools
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from launched import command

from asyncrl.roles import COORDINATOR
from asyncrl.rollout.engines.base import EngineError, GenerationRequest, SamplingParams
from asyncrl.runfiles.layout import RunDir
from asyncrl.weights.canary import CanaryError, make_canary
from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.published import WholeWeights
from asyncrl.weights.shm.publisher import ShmPublisher
from asyncrl.weights.shm.subscriber import ShmWeights
from asyncrl.weights.source import LocalWeights, WeightsError
from asyncrl.weights.transport import find_transport
from asyncrl.wire.keys import Endpoint, Keys

pytestmark = pytest.mark.vllm

DEADLINE_S = 240.0


@pytest.fixture(autouse=True)
def _receivers_can_be_found(monkeypatch):
    """vLLM's processes import the faulty receivers by name."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.fixture
def make_qwen3(make_qwen3):
    """Heads as wide as vLLM's CPU kernels ask for."""
    return partial(make_qwen3, hidden=128)


@pytest.fixture
def start(make_qwen3, tmp_path):
    """`start(receiver=..., ...)`: an engine for `make_qwen3` models. Started in the test's event loop."""
    import imported_vllm  # noqa: F401

    from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
    from asyncrl.rollout.engines.vllm.engine import VllmEngine
    from asyncrl.rollout.engines.vllm.launch import LaunchSettings, launch

    def start(dtype="float32", model=None, kv_on_update="keep", **settings):
        model = model or make_qwen3()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path)
        limits = {"capacity": 4, "max_length": 128}
        if "receiver" in settings:
            settings["receiver"] = f"faulty_receivers.{settings['receiver']}"
        llm = launch(LaunchSettings(str(tmp_path), dtype, **limits, **settings))
        expected = ExpectedWeights(str(tmp_path), dtype)
        return VllmEngine(llm, expected, **limits, kv_on_update=kv_on_update, answer_timeout_s=60.0)

    return start


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, DEADLINE_S))


def version(number, model):
    return LocalWeights(number, model.state_dict(), make_canary(model))


def request(name="r", tokens=20):
    return GenerationRequest(name, np.arange(3, 9, dtype=np.int32), SamplingParams(tokens))


async def collect(stream):
    return [chunk async for chunk in stream]


@pytest.mark.parametrize(
    ("receiver", "says"),
    [
        ("SkipsALayer", r"1 of its tensors .*: model\.layers\.1\.mlp\.down_proj\.weight\."),
        ("KeepsTheOldTiedHead", r"1 of its tensors .*: lm_head\.weight\."),
        ("LoadsInAnotherDtype", r"its tensors .*: model\.embed_tokens\.weight, .*self_attn\.q_proj\.weight"),
        ("SwapsKeysAndValues", r"2 of its tensors .*\.0\.self_attn\.k_proj\.weight, .*v_proj\.weight\."),
    ],
)
def test_the_tensors_that_an_engine_does_not_hold_are_named(start, make_qwen3, receiver, says):
    async def scenario():
        engine = start(receiver=receiver)
        running = asyncio.create_task(engine.run())
        waiting = asyncio.create_task(collect(engine.generate(request(tokens=100))))
        try:
            with pytest.raises(CanaryError, match=says):
                await engine.update_weights(version(1, make_qwen3(seed=1)))
            with pytest.raises(EngineError, match="canary"):
                await waiting  # nothing of the wrong weights is delivered
            with pytest.raises(CanaryError):
                await running
        finally:
            await engine.close()

    run(scenario())


@pytest.mark.slow
def test_each_rank_proves_its_own_shards(start, make_qwen3):
    async def scenario():
        engine = start(receiver="TakesTheShardOfRank0AfterVersion0", tensor_parallel_size=2)
        try:
            await engine.update_weights(version(0, make_qwen3()))
            assert not engine._unknown, "a tensor that nothing compares"
            with pytest.raises(CanaryError, match=r"1 of .*\.mlp\.down_proj\.weight on rank 1\."):
                await engine.update_weights(version(1, make_qwen3(seed=1)))
        finally:
            await engine.close()

    run(scenario())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_weights_are_proven_and_calibrate_the_alarm(start, make_qwen3, tie, dtype):
    make = partial(make_qwen3, tie=tie, dtype=getattr(torch, dtype))

    async def scenario():
        engine = start(dtype, make())
        try:
            for number in (1, 2, 3):
                report = await engine.update_weights(version(number, make(seed=number)))
                assert report.version == engine.stats().version == number
                assert not engine._unknown, "a tensor that nothing compares"
                canary = make_canary(make())
                assert engine._alarm.tolerance(canary) < canary.limits.cap
            wrong = make_canary(make(seed=9))
            with pytest.raises(CanaryError, match=r"every tensor is as published, so the two compute differ"):
                await engine.update_weights(LocalWeights(4, make(seed=4).state_dict(), wrong))
        finally:
            await engine.close()

    run(scenario())


def test_a_half_loaded_version_breaks_the_engine(start, make_qwen3):
    async def scenario():
        engine = start(receiver="FailsHalfWay")
        waiting = asyncio.create_task(collect(engine.generate(request(tokens=100))))
        try:
            with pytest.raises(EngineError, match=r"update to version 1 failed half-way.*out of memory, say"):
                await engine.update_weights(version(1, make_qwen3(seed=1)))
            with pytest.raises(EngineError, match="half-way"):
                await waiting
            with pytest.raises(EngineError, match="half-way"):
                engine.generate(request("later"))
        finally:
            await engine.close()

    run(scenario())


def test_a_version_that_was_overwritten_is_refused_and_the_next_one_taken(start, make_qwen3):
    models = [make_qwen3(seed=seed) for seed in range(3)]
    publisher = ShmPublisher(f"asyncrl-test-{psutil.Process().pid}")

    async def scenario():
        engine = start()
        try:
            first = publisher.publish(0, WholeWeights(models[0].state_dict()))
            await engine.update_weights(ShmWeights(first))
            second = publisher.publish(2, WholeWeights(models[1].state_dict()))  # into the same buffer
            with pytest.raises(WeightsError, match=r"version 0 .* does not match its checksum"):
                await engine.update_weights(ShmWeights(first))
            assert isinstance(second, WeightNotice)
            await engine.update_weights(ShmWeights(second))
            assert engine.stats().version == 2
            (chunk,) = await collect(engine.generate(request()))
            assert [span.version for span in chunk.versions] == [2]
        finally:
            await engine.close()
            publisher.close()

    run(scenario())


def test_vllms_workers_take_versions_from_the_transport_themselves(start, make_qwen3, tmp_path):
    RunDir(tmp_path).announce_endpoint(COORDINATOR, Endpoint.of("tcp://127.0.0.1:1", Keys.new()))
    name = f"asyncrl-test-{psutil.Process().pid}"
    ends = {
        spec: [find_transport(spec)(f"{name}-{spec}", tmp_path) for _ in range(2)]
        for spec in ("collective", "ipc")
    }

    async def scenario():
        engine = start()
        try:
            for number, spec in enumerate(["collective", "collective", "ipc", "ipc", "collective"]):
                (trainer, worker), model = ends[spec], make_qwen3(seed=number)
                notice = trainer.publish(number, WholeWeights(model.state_dict()), make_canary(model))
                await engine.update_weights(worker.source(notice))  # proves every tensor, and the canary
            (chunk,) = await collect(engine.generate(request()))
            assert [span.version for span in chunk.versions] == [4]
            assert ends["collective"][1]._member._group is None, "the worker that has vLLM takes no part"
        finally:
            await engine.close()
            for end in (*ends["collective"], *ends["ipc"][:1]):
                end.close()

    run(scenario())


@pytest.mark.parametrize("kv_on_update", ["keep", "recompute", "resubmit"])
def test_prompts_that_take_several_steps(start, make_qwen3, kv_on_update):
    """More prompt tokens than a step computes, of seeded requests: vLLM's CPU build dies of cutting one."""

    async def scenario():
        engine = start(prefill_tokens=150, kv_on_update=kv_on_update)
        try:
            await engine.update_weights(version(0, make_qwen3()))
            streams = []
            for i in range(12):
                prompt = np.random.default_rng(i).integers(2, 97, 60).astype(np.int32)
                streams.append(
                    engine.generate(GenerationRequest(f"r{i}", prompt, SamplingParams(30, seed=i)))
                )
            collecting = [asyncio.create_task(collect(stream)) for stream in streams]
            await engine.update_weights(version(1, make_qwen3(seed=1)))
            for (chunk,) in await asyncio.gather(*collecting):
                assert len(chunk.token_ids) == 30
        finally:
            await engine.close()

    run(scenario())


def test_a_resubmitted_request_goes_on_as_if_nothing_had_been(start, make_qwen3):
    """Zeros as weights, so that the random numbers alone choose the tokens: a seed that began anew would
    repeat them. Limits and stop tokens count from the request's own beginning."""
    flat = make_qwen3()
    for weight in flat.parameters():
        torch.nn.init.zeros_(weight)
    limit, stops = 100, (10, 11)
    prompt = np.arange(3, 9, dtype=np.int32)
    sampling = [SamplingParams(limit, seed=i, stop_token_ids=stops * (i % 2)) for i in range(16)]
    sent = []

    async def update_often(engine):
        for number in itertools.count(1):
            generated = engine.stats().generated_tokens
            while engine.stats().generated_tokens < generated + 40:
                await asyncio.sleep(0)
            await engine.hold()
            await engine.update_weights(LocalWeights(number, flat.state_dict()))
            await engine.release()

    async def scenario():
        engine = start(kv_on_update="resubmit", report_every_tokens=1)
        send = engine.llm.generate

        def sending(what, *others):
            sent.append((what["prompt_token_ids"], what["cache_salt"].partition("#")[0]))
            return send(what, *others)

        engine.llm.generate = sending
        try:
            await engine.update_weights(version(0, flat))
            streams = [engine.generate(GenerationRequest(f"r{i}", prompt, s)) for i, s in enumerate(sampling)]
            collecting = [asyncio.create_task(collect(stream)) for stream in streams]
            updating = asyncio.create_task(update_often(engine))
            chunks = [chunk for (chunk,) in await asyncio.gather(*collecting)]
            updating.cancel()
            await asyncio.gather(updating, return_exceptions=True)
        finally:
            await engine.close()
        for s, chunk in zip(sampling, chunks, strict=True):
            ids = chunk.token_ids.tolist()
            first_stop = next((i for i, token in enumerate(ids) if token in s.stop_token_ids), None)
            assert len(ids) == (limit if first_stop is None else first_stop + 1)
            assert chunk.finish_reason == ("length" if first_stop is None else "stop")
            for span in chunk.versions:
                assert ([*prompt.tolist(), *ids[: span.start]], f"v{span.version}") in sent
            pieces = [tuple(ids[span.start : span.start + 3]) for span in chunk.versions if span.length >= 3]
            assert len(set(pieces)) == len(pieces), "the same random numbers again"
        interrupted = [chunk for chunk in chunks if len(chunk.versions) > 1]
        assert {chunk.finish_reason for chunk in interrupted} == {"length", "stop"}
        np.testing.assert_allclose(np.concatenate([c.logprobs for c in chunks]), -np.log(97), atol=1e-5)

    run(scenario())


def test_two_hundred_updates_leave_the_memory_as_it_was(start, make_qwen3):
    """After some updates for the allocator to settle, the engine's process may grow by a fraction of what the
    updates moved through it."""
    models = [make_qwen3(seed=seed, vocab_size=2048) for seed in range(2)]
    moved = sum(t.nbytes for t in models[0].state_dict().values())

    async def scenario():
        others = set(psutil.Process().children())
        engine = start(model=models[0])
        try:
            (core,) = {
                p for p in psutil.Process().children() if "EngineCore" in " ".join(command(p))
            } - others
            for number in range(200):
                await engine.update_weights(version(number, models[number % 2]))
                if number == 19:
                    before = core.memory_info().rss
            grown = core.memory_info().rss - before
            assert grown < 4 * moved, f"grew by {grown:,} bytes in 180 updates of {moved:,} bytes"
        finally:
            await engine.close()

    run(scenario())
