"""The conformance suite: what every engine behind the `Engine` protocol does, against plain transformers."""

from __future__ import annotations

import asyncio
import sys
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_reference import Output, collect, processed_logprobs, recomputed, stitched, versions_of_keys

from asyncrl.config import ModelConfig
from asyncrl.config.trainer import LoraConfig
from asyncrl.core.records import Batch, FinishReason, Group, Trajectory
from asyncrl.rollout.engines.base import EngineError, GenerationRequest, SamplingParams
from asyncrl.rollout.transcript import Completion, Transcript
from asyncrl.trainer.lora.adapter import Adapter
from asyncrl.trainer.models.packed import PackedModel
from asyncrl.trainer.models.policy import Policy
from asyncrl.trainer.packing.batch import flatten
from asyncrl.trainer.packing.pack import ONE_SEQUENCE, make_micro_batch, pack_lengths
from asyncrl.trainer.packing.prefix import single_units
from asyncrl.weights.adapters import BaseModel, MergedWeights
from asyncrl.weights.canary import make_canary
from asyncrl.weights.source import LocalWeights, WeightsError
from asyncrl.wire.codec import check_group, decode_group, encode_group

VOCAB = 97
EXPECTED = {"keep": stitched, "recompute": recomputed, "resubmit": recomputed}
"""Log-probabilities after updates in flight, by `kv_on_update`."""


def request(name: str, prompt: int | list[int], new_tokens: int = 16, **sampling) -> GenerationRequest:
    """A request of random prompt tokens (their number given) or given ones."""
    if isinstance(prompt, int):
        prompt = np.random.default_rng(len(name) * 1000 + sum(map(ord, name))).integers(2, VOCAB, prompt)
    return GenerationRequest(
        name, np.asarray(prompt, np.int32), SamplingParams(max_new_tokens=new_tokens, **sampling)
    )


async def generate(harness, engine, requests) -> list[Output]:
    streams = [asyncio.ensure_future(collect(engine.generate(r))) for r in requests]
    await harness.progress(engine, sys.maxsize)
    return await asyncio.gather(*streams)


def test_greedy_tokens_equal_generate(run, harness, make_model):
    model = make_model()
    requests = [request(f"r{i}", 3 + 4 * i, 20, temperature=0.0) for i in range(5)]
    engine = harness.make(model, stop_token_ids=(1,))
    outputs = run(generate(harness, engine, requests))
    for r, output in zip(requests, outputs, strict=True):
        ids = torch.from_numpy(r.prompt_ids.astype(np.int64))[None]
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20
        )
        assert output.ids == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 0.9, "top_k": 12, "top_p": 0.6},
        {"temperature": 0.0, "top_k": 5, "top_p": 0.5},
    ],
    ids=str,
)
def test_logprobs_are_of_the_distribution_sampled_from(run, harness, make_model, sampling):
    model = make_model()
    requests = [request(f"r{i}", 1 + 5 * i, 24, seed=i, **sampling) for i in range(6)]
    outputs = run(generate(harness, harness.make(model), requests))
    for r, output in zip(requests, outputs, strict=True):
        expected = recomputed({0: model}, r, output)
        assert np.isfinite(expected).all(), "sampled outside the filters"
        assert np.abs(output.logprobs - expected).max() < harness.logprob_tolerance


def test_different_sampling_side_by_side(run, harness, make_model):
    model = make_model()
    kinds = [{}, {"temperature": 0.0}, {"temperature": 0.5, "top_p": 0.7}, {"top_k": 3}]
    requests = [request(f"r{i}", 4 + i, 20, seed=i, **kind) for i, kind in enumerate(kinds)]
    outputs = run(generate(harness, harness.make(model), requests))
    for r, output in zip(requests, outputs, strict=True):
        assert np.abs(output.logprobs - recomputed({0: model}, r, output)).max() < harness.logprob_tolerance


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_new_tokens": 9, "stop_token_ids": (*range(40),)},
        {"top_p": 0.9},
        {"top_k": 3, "temperature": 1.3},
        {"min_new_tokens": 5, "stop_token_ids": (*range(60),)},
    ],
    ids=str,
)
def test_on_policy_every_ratio_is_1(run, harness, make_model, sampling):
    """From the engine by the wire to the trainer's own log-probabilities, which are of a policy that is
    renormalised over what each token was sampled among."""
    params = SamplingParams(24, **sampling)
    if not harness.tells_kept and params.cuts:
        pytest.skip("this engine does not tell what it has sampled among")
    model = make_model()
    with torch.no_grad():  # logits as small as a trained model's, which rounding moves less
        model.get_output_embeddings().weight.mul_(0.3)
    requests = [request(f"r{i}", 3 + 4 * i, 24, seed=i, **sampling) for i in range(6)]
    trajectories = run(trajectories_of(harness, harness.make(model), requests))
    for r, t in zip(requests, trajectories, strict=True):
        assert len(t.token_ids) - len(r.prompt_ids) >= params.min_new_tokens
        t.reward = 0.0
    wire = encode_group(Group(0, 0, trajectories), 0)
    check_group(wire, len(trajectories))
    flat = flatten(Batch(0, 0, 0, (decode_group(wire),)))
    policy = Policy(model, temperature=params.temperature, chunk_tokens=16)
    row_tokens = 64
    if harness.hybrid:
        policy.unpacked, row_tokens = "its recurrent state", ONE_SEQUENCE
    lengths = flat.trained_lengths()
    units = single_units(lengths)
    off, off_without = [], []
    for layout in pack_lengths([unit.tokens for unit in units], 100, row_tokens):
        micro = make_micro_batch(flat, lengths, units, layout)
        targets, mu = (
            torch.from_numpy(a)[micro.token_index] for a in (flat.token_ids, flat.behavior_logprobs)
        )
        for errors, seen in ((off, micro), (off_without, replace(micro, kept=None))):
            errors.append(((policy(seen, targets)[0] - mu).exp() - 1).abs().max().item())
    assert max(off) < 1e-5
    assert max(off_without) > 1e-2  # guards the line above


async def trajectories_of(harness, engine, requests) -> list[Trajectory]:
    async def carry_out(request, stream) -> Trajectory:
        completion = Completion.of([chunk async for chunk in stream])
        transcript = Transcript(request.prompt_ids)
        transcript.sampled(completion)
        return transcript.trajectory(completion.finish_reason)

    running = [asyncio.ensure_future(carry_out(r, engine.generate(r))) for r in requests]
    await harness.progress(engine, sys.maxsize)
    return await asyncio.gather(*running)


async def swapped_in_flight(harness, engine, requests, sources, *, sleeps=False) -> list[Output]:
    """One version after the other, while all of the requests run. sleeps: the engine, before each."""
    streams = [asyncio.ensure_future(collect(engine.generate(r))) for r in requests]
    for source in sources:
        await harness.progress(engine, 5 * len(requests))
        assert engine.stats().running == len(requests)
        if sleeps:
            await engine.sleep()
        report = await engine.update_weights(source)
        assert report.version == source.version
        assert engine.stats().version == source.version
    await harness.progress(engine, sys.maxsize)
    return await asyncio.gather(*streams)


@pytest.mark.parametrize("sleeps", [False, True])
def test_weights_swapped_in_flight(run, harness, make_model, kv_on_update, sleeps):
    """16 running requests, ragged, four versions: every token has the logprob of the version that it is
    stamped with. All are long enough that none is over before an engine on a busy machine can be held.
    sleeps: each version is what the engine wakes with."""
    if sleeps and not (harness.sleeps and kv_on_update == "recompute"):
        pytest.skip("this engine does not sleep, or keeps what it would give up")
    models = {v: make_model(seed=v) for v in range(4)}
    lengths = np.random.default_rng(0).integers(70, 100, 16)
    requests = [
        request(f"r{i}", 1 + (7 * i) % 23, int(n), seed=i, temperature=0.9) for i, n in enumerate(lengths)
    ]
    requests += [request("first", [5, 6, 7, 8], 80, seed=50), request("equal", [5, 6, 7, 8], 90, seed=51)]
    engine = harness.make(models[0], capacity=18, kv_on_update=kv_on_update)
    sources = [LocalWeights(version, models[version].state_dict()) for version in (1, 2, 3)]
    outputs = run(swapped_in_flight(harness, engine, requests, sources, sleeps=sleeps))
    for r, output in zip(requests, outputs, strict=True):
        assert len(output.ids) == r.sampling.max_new_tokens
        assert output.finish_reason is FinishReason.LENGTH
        assert output.versions == sorted(output.versions)
        assert set(output.versions) == {0, 1, 2, 3}
        error = np.abs(output.logprobs - EXPECTED[kv_on_update](models, r, output)).max()
        assert error < harness.logprob_tolerance


def test_adapters_swapped_in_flight(run, harness, make_model, kv_on_update, tmp_path):
    """Every token has the logprob that PEFT computes with the adapter of its version, base and adapter
    apart."""
    base = make_model()
    base.save_pretrained(tmp_path)
    lora = LoraConfig(rank=4, alpha=8.0)
    merging = BaseModel(ModelConfig(path=str(tmp_path)), lora)
    models, sources = {0: base}, []
    for version in (1, 2):
        adapter = random_adapter(base, lora, version)
        models[version] = with_adapter(base, adapter, lora)
        sources.append(
            MergedWeights(LocalWeights(version, adapter.weights(), make_canary(adapter.model)), merging)
        )
    requests = [request(f"r{i}", 1 + 5 * i, 70 + i, seed=i, temperature=0.9) for i in range(3)]
    engine = harness.make(base, capacity=18, kv_on_update=kv_on_update)
    outputs = run(swapped_in_flight(harness, engine, requests, sources))
    for r, output in zip(requests, outputs, strict=True):
        assert set(output.versions) == {0, 1, 2}
        error = np.abs(output.logprobs - EXPECTED[kv_on_update](models, r, output)).max()
        assert error < harness.logprob_tolerance
        unadapted = np.abs(output.logprobs - EXPECTED[kv_on_update](dict.fromkeys(models, base), r, output))
        assert unadapted.max() > 0.1


def random_adapter(base, lora, seed) -> Adapter:
    adapter = Adapter(PackedModel(deepcopy(base)), lora, seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora[1].normal_(0.0, 0.2, generator=random)
    adapter.merge()
    return adapter


@torch.no_grad()
def with_adapter(base, adapter, lora):
    """The same by PEFT."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(adapter.layers))
    model = peft.get_peft_model(deepcopy(base), settings).eval()
    for name, layer in adapter.layers.items():
        theirs = model.base_model.model.get_submodule(name)
        theirs.lora_A["default"].weight.copy_(layer.lora[0])
        theirs.lora_B["default"].weight.copy_(layer.lora[1])
    return model


def test_bfloat16_is_as_near_as_its_rounding(run, harness, make_model):
    """To transformers in the same dtype, across an update; the other version is far off."""
    models = {v: make_model(seed=v, dtype=torch.bfloat16) for v in range(2)}
    requests = [request(f"r{i}", 3 + 5 * i, 80, seed=i, temperature=0.9) for i in range(6)]
    engine = harness.make(models[0], capacity=64, kv_on_update="recompute")

    async def scenario() -> list[Output]:
        streams = [asyncio.ensure_future(collect(engine.generate(r))) for r in requests]
        await harness.progress(engine, 15 * len(requests))
        await engine.update_weights(LocalWeights(1, models[1].state_dict()))
        await harness.progress(engine, sys.maxsize)
        return await asyncio.gather(*streams)

    outputs = list(zip(requests, run(scenario()), strict=True))
    assert all(set(output.versions) == {0, 1} for _, output in outputs)

    def error(models) -> float:
        return np.mean([np.abs(o.logprobs - recomputed(models, r, o)).mean() for r, o in outputs])

    assert error(models) < 5e-2
    assert error({0: models[1], 1: models[0]}) > 1.0


def test_the_two_references_differ(make_model):
    """Guards the test above: keeping and recomputing the cache can be told apart."""
    models = {v: make_model(seed=v) for v in range(2)}
    r = request("r", 6)
    output = Output([9] * 12, np.zeros(12, np.float32), [0] * 6 + [1] * 6, FinishReason.LENGTH)
    difference = np.abs(recomputed(models, r, output) - stitched(models, r, output))
    assert difference[:6].max() < 1e-4
    assert difference[6:].min() > 1e-2


def test_a_sleeping_engine_takes_requests_and_wakes_with_the_version_that_it_had(run, harness, make_model):
    if not harness.sleeps:
        pytest.skip("this engine does not sleep")
    engine = harness.make(make_model(), kv_on_update="recompute")
    requests = [request(name, 5, 24, seed=7) for name in ("awake", "asleep", "gone")]
    requests = [replace(r, prompt_ids=requests[0].prompt_ids) for r in requests]

    async def go() -> list[Output]:
        [alone] = await generate(harness, engine, [replace(requests[0], request_id="alone")])
        streams = [asyncio.ensure_future(collect(engine.generate(requests[0])))]
        await harness.progress(engine, 5)
        await engine.sleep()
        before = engine.stats().generated_tokens
        streams += [asyncio.ensure_future(collect(engine.generate(r))) for r in requests[1:]]
        await asyncio.sleep(0)
        engine.abort("gone")
        assert (await streams[2]).finish_reason is FinishReason.ABORT
        assert engine.stats().generated_tokens == before
        await engine.update_weights(LocalWeights(0, make_model().state_dict()))
        await harness.progress(engine, sys.maxsize)
        return [alone, *(await asyncio.gather(*streams[:2]))]

    alone, awake, asleep = run(go())
    assert awake.ids == asleep.ids == alone.ids
    assert set(awake.versions) == set(asleep.versions) == {0}


def test_prompts_are_not_shared_across_versions(run, harness, make_model, kv_on_update):
    """An equal prompt that comes after an update is computed by the new weights, though the old one still
    runs."""
    models = {v: make_model(seed=v) for v in range(2)}
    engine = harness.make(models[0], kv_on_update=kv_on_update)
    prompt = list(range(3, 20))

    async def scenario() -> Output:
        old = asyncio.ensure_future(collect(engine.generate(request("old", prompt, 40))))
        await harness.progress(engine, 10)
        await engine.update_weights(LocalWeights(1, models[1].state_dict()))
        new = asyncio.ensure_future(collect(engine.generate(request("new", prompt, 12, seed=3))))
        await harness.progress(engine, sys.maxsize)
        await old
        return await new

    output = run(scenario())
    assert set(output.versions) == {1}
    expected = recomputed(models, request("new", prompt, 12, seed=3), output)
    assert np.abs(output.logprobs - expected).max() < harness.logprob_tolerance


def test_a_next_turn_goes_on_from_the_one_before_within_a_version(run, harness, make_model):
    """Three turns, an update, a fourth: it computes everything anew. Engines may count whole blocks of 32."""
    models = {v: make_model(seed=v) for v in range(2)}
    engine = harness.make(models[0])
    turns: list[tuple[GenerationRequest, Output]] = []

    async def turn(prompt: list[int]) -> list[int]:
        r = request(f"turn {len(turns)}", prompt, 15)
        turns.append((r, (await generate(harness, engine, [r]))[0]))
        return [*prompt, *turns[-1][1].ids, 5, 6, 7]

    async def scenario() -> None:
        third = await turn(await turn(list(range(2, 52))))
        await turn(third)
        await engine.update_weights(LocalWeights(1, models[1].state_dict()))
        await turn(third)

    run(scenario())
    for r, output in turns:
        assert np.abs(output.logprobs - recomputed(models, r, output)).max() < harness.logprob_tolerance
    reused = [output.reused for _, output in turns]
    if harness.reuses is None:
        assert reused == [None] * 4
    elif harness.reuses:
        assert reused[0] == reused[3] == 0
        assert 64 <= reused[1] <= 64 + 15 and 64 <= reused[2] <= 67 + 15
    else:
        assert reused == [0] * 4


def test_a_next_turn_goes_on_through_updates_where_keys_are_kept(run, harness, make_model, kv_on_update):
    """Within its episode: each token's keys and values are those of the weights that computed it. What else
    begins with the same tokens, asked before it or after, has them by the live weights alone."""
    models = {v: make_model(seed=v) for v in range(4)}
    engine = harness.make(models[0], kv_on_update=kv_on_update)
    turns: list[tuple[GenerationRequest, Output]] = []
    others: list[tuple[GenerationRequest, Output]] = []

    async def turn(prompt: list[int], tokens: int, update: int) -> list[int]:
        """With an update when some of its tokens are there, unless it is over by then."""
        since = turns[0][1].versions[0] if turns else None
        r = replace(request(f"turn {len(turns)}", prompt, tokens), since=since)
        stream = asyncio.ensure_future(collect(engine.generate(r)))
        await harness.progress(engine, 4)
        await engine.update_weights(LocalWeights(update, models[update].state_dict()))
        await harness.progress(engine, sys.maxsize)
        turns.append((r, await stream))
        return [*prompt, *turns[-1][1].ids, 5, 6, 7]

    async def another(prompt: list[int]) -> None:
        r = request(f"other {len(others)}", prompt, 5)
        others.append((r, (await generate(harness, engine, [r]))[0]))

    async def scenario() -> None:
        second = await turn(list(range(2, 52)), 16, 1)
        await another(second[:60])
        await engine.update_weights(LocalWeights(2, models[2].state_dict()))
        third = await turn(second, 30, 3)
        await turn(third, 12, 3)
        await another(third[:90])

    run(scenario())
    keys: list[int] = []
    for (r, output), before in zip(turns, [None, *turns], strict=False):
        if kv_on_update == "keep":
            expected = stitched(models, r, output, keys)
            keys = versions_of_keys(r, output, keys)
            if harness.reuses and before is not None:
                known = len(before[0].prompt_ids) + len(before[1].ids) - 1
                assert known - 32 < output.reused <= known
        else:
            expected = recomputed(models, r, output)
        assert np.abs(output.logprobs - expected).max() < harness.logprob_tolerance
    for r, output in others:
        assert np.abs(output.logprobs - recomputed(models, r, output)).max() < harness.logprob_tolerance
        assert kv_on_update != "keep" or not output.reused
    assert [output.versions[0] for _, output in others] == [1, 3]


@pytest.mark.parametrize("seed", range(6))
def test_random_traffic(run, harness, make_model, kv_on_update, seed):
    """Requests of few prompts arrive, end, are aborted and see weights change in any order; all exact."""
    models = {v: make_model(seed=v) for v in range(8)}
    rng = np.random.default_rng(seed)
    engine = harness.make(models[0], capacity=int(rng.integers(1, 5)), kv_on_update=kv_on_update)
    prompts = [[int(i) for i in rng.integers(2, VOCAB, n)] for n in (1, 2, 7, 7, 19)]

    async def scenario() -> list[tuple[GenerationRequest, Output]]:
        requests, streams = [], []
        version = 0
        for _ in range(60):
            event = rng.choice(["arrive", "arrive", "work", "abort", "publish"])
            if event == "arrive":
                prompt, tokens = prompts[rng.integers(len(prompts))], int(rng.integers(1, 14))
                requests.append(request(f"r{len(requests)}", prompt, tokens, seed=len(requests)))
                streams.append(asyncio.ensure_future(collect(engine.generate(requests[-1]))))
            elif event == "abort" and requests and rng.random() < 0.3:
                engine.abort(f"r{rng.integers(len(requests))}")
            elif event == "publish" and version < 7:
                version += 1
                await engine.update_weights(LocalWeights(version, models[version].state_dict()))
            else:
                await harness.progress(engine, int(rng.integers(1, 9)))
        await harness.progress(engine, sys.maxsize)
        return list(zip(requests, await asyncio.gather(*streams), strict=True))

    results = run(scenario())
    assert len({v for _, output in results for v in output.versions}) > 3
    for r, output in results:
        if output.finish_reason is not FinishReason.ABORT:
            assert len(output.ids) == r.sampling.max_new_tokens
        if output.ids:
            error = np.abs(output.logprobs - EXPECTED[kv_on_update](models, r, output)).max()
            assert error < harness.logprob_tolerance


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(run, harness, make_model):
    model = make_model()
    one = request("one", 9, 30, seed=7, top_p=0.9)
    crowd = [request(f"r{i}", 2 + i, 10 + 3 * i, seed=i, top_k=i) for i in range(9)]
    alone = run(generate(harness, harness.make(model), [one]))[0]
    among = run(generate(harness, harness.make(model), [*crowd[:5], one, *crowd[5:]]))[5]
    assert among.ids == alone.ids
    assert np.abs(among.logprobs - alone.logprobs).max() < harness.logprob_tolerance


def test_different_seeds_differ(run, harness, make_model):
    requests = [request(f"r{seed}", [4, 5, 6], 12, seed=seed) for seed in range(8)]
    outputs = run(generate(harness, harness.make(make_model(), capacity=8), requests))
    assert len({tuple(output.ids) for output in outputs}) == 8


def test_first_tokens_follow_the_softmax(run, harness, make_model):
    """Chi-square over the likeliest tokens and the rest together; the seeds are fixed, so the outcome is
    too."""
    model = make_model()
    draws = 2000
    requests = [request(f"r{i}", [4, 5, 6], 1, seed=i) for i in range(draws)]
    outputs = run(generate(harness, harness.make(model, capacity=64), requests))
    with torch.no_grad():
        logits = model(torch.tensor([[4, 5, 6]])).logits[0, -1].numpy()
    probabilities = np.exp(processed_logprobs(logits, SamplingParams(1)))
    counts = np.bincount([output.ids[0] for output in outputs], minlength=VOCAB)
    likely = probabilities * draws >= 10
    assert likely.sum() >= 4
    expected = np.append(probabilities[likely], probabilities[~likely].sum()) * draws
    observed = np.append(counts[likely], counts[~likely].sum())
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    degrees = len(expected) - 1
    assert chi_square < degrees + 4 * np.sqrt(2 * degrees)


def test_stop_tokens_end_the_output_and_belong_to_it(run, harness, make_model):
    model = make_model()
    free = run(generate(harness, harness.make(model), [request("free", 5, 40, seed=1)]))[0]
    stop = free.ids[10]
    expected = free.ids[: free.ids.index(stop) + 1]

    own = request("own", 5, 40, seed=1, stop_token_ids=(stop, VOCAB + 5))
    own = GenerationRequest("own", request("free", 5).prompt_ids, own.sampling)
    by_request = run(generate(harness, harness.make(model), [own]))[0]
    plain = GenerationRequest("plain", own.prompt_ids, SamplingParams(40, seed=1))
    by_engine = run(generate(harness, harness.make(model, stop_token_ids=(stop,)), [plain]))[0]
    for output in (by_request, by_engine):
        assert output.ids == expected
        assert output.finish_reason is FinishReason.STOP


def test_a_stop_token_at_the_limit_is_a_stop(run, harness, make_model):
    model = make_model()
    free = run(generate(harness, harness.make(model), [request("r", 5, 8, seed=1)]))[0]
    count = free.ids.index(free.ids[7]) + 1
    again = request("r", 5, count, seed=1, stop_token_ids=(free.ids[7],))
    assert run(generate(harness, harness.make(model), [again]))[0].finish_reason is FinishReason.STOP
    assert free.finish_reason is FinishReason.LENGTH


def test_more_requests_than_slots(run, harness, make_model):
    """Slots are refilled as they finish, in the order of the requests, and each result is as if alone."""
    model = make_model()
    requests = [request(f"r{i}", 1 + (5 * i) % 17, 1 + (11 * i) % 29, seed=i) for i in range(23)]
    engine = harness.make(model, capacity=3)
    outputs = run(generate(harness, engine, requests))
    for r, output in zip(requests, outputs, strict=True):
        assert len(output.ids) == r.sampling.max_new_tokens
        assert np.abs(output.logprobs - recomputed({0: model}, r, output)).max() < harness.logprob_tolerance

    async def totals():
        return engine.stats()

    stats = run(totals())
    assert (stats.running, stats.waiting) == (0, 0)
    assert stats.generated_tokens == sum(len(output.ids) for output in outputs)
    assert stats.busy_s > 0


def test_admission_is_first_come_first_served(run, harness, make_model):
    engine = harness.make(make_model(), capacity=1)
    finished: list[str] = []

    async def scenario() -> None:
        async def note(r: GenerationRequest) -> None:
            await collect(engine.generate(r))
            finished.append(r.request_id)

        notes = [asyncio.ensure_future(note(request(f"r{i}", 2 + i, 9 - i))) for i in range(8)]
        await asyncio.sleep(0)
        await harness.progress(engine, sys.maxsize)
        await asyncio.gather(*notes)

    run(scenario())
    assert finished == [f"r{i}" for i in range(8)]


@pytest.mark.parametrize("capacity", [2, 8])
def test_equal_prompts_give_what_they_give_alone(run, harness, make_model, capacity):
    model = make_model()
    prompt = list(range(2, 31))
    group = [request(f"r{i}", prompt, 8 + i, seed=i) for i in range(6)]
    other = request("other", 11, 12, seed=99)
    outputs = run(generate(harness, harness.make(model, capacity=capacity), [*group[:3], other, *group[3:]]))
    for r, output in zip([*group[:3], other, *group[3:]], outputs, strict=True):
        alone = run(generate(harness, harness.make(model, capacity=1), [r]))[0]
        assert output.ids == alone.ids
        assert np.abs(output.logprobs - recomputed({0: model}, r, output)).max() < harness.logprob_tolerance


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (request("bad", []), "empty prompt"),
        (request("bad", 100, 29), "max_length=128"),
        (request("bad", 3, 0), "max_new_tokens=0"),
        (request("bad", [3, VOCAB]), "vocabulary"),
        (request("bad", [3, -1]), "vocabulary"),
        (request("bad", 3, temperature=-0.5), "temperature"),
        (request("bad", 3, top_p=0.0), "top_p"),
        (GenerationRequest("bad", np.ones((1, 3), np.int32), SamplingParams(4)), "prompt_ids"),
        (GenerationRequest("bad", np.ones(3, np.float32), SamplingParams(4)), "prompt_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_requests_are_refused_at_once(run, harness, make_model, bad, says):
    engine = harness.make(make_model())

    async def scenario() -> Output:
        with pytest.raises(ValueError, match=says) as refusal:
            engine.generate(bad)
        assert "'bad'" in str(refusal.value)
        return (await generate(harness, engine, [request("good", 100, 28)]))[0]

    assert len(run(scenario()).ids) == 28


def test_a_running_request_id_is_refused(run, harness, make_model):
    engine = harness.make(make_model())

    async def scenario() -> None:
        first = asyncio.ensure_future(collect(engine.generate(request("same", 3))))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="same"):
            engine.generate(request("same", 4))
        await harness.progress(engine, sys.maxsize)
        await first

    run(scenario())


def test_abort_gives_what_there_is(run, harness, make_model):
    model = make_model()
    requests = [request(f"r{i}", 3 + i, 110, seed=i) for i in range(3)]
    engine = harness.make(model, capacity=2)

    async def scenario() -> list[Output]:
        streams = [asyncio.ensure_future(collect(engine.generate(r))) for r in requests]
        await asyncio.sleep(0)
        await harness.progress(engine, 20)
        engine.abort("r2")  # waiting
        engine.abort("r0")  # running
        engine.abort("nobody")
        engine.abort("r0")
        await harness.progress(engine, sys.maxsize)
        return await asyncio.gather(*streams)

    aborted, whole, waiting = run(scenario())
    assert aborted.finish_reason is waiting.finish_reason is FinishReason.ABORT
    assert waiting.ids == []
    assert 0 < len(aborted.ids) < 110
    assert len(whole.ids) == 110
    for r, output in zip(requests[:2], (aborted, whole), strict=True):
        assert np.abs(output.logprobs - recomputed({0: model}, r, output)).max() < harness.logprob_tolerance


def test_a_cancelled_consumer_frees_its_slot(run, harness, make_model):
    engine = harness.make(make_model(), capacity=1)

    async def scenario() -> Output:
        gone = asyncio.ensure_future(collect(engine.generate(request("gone", 3, 100))))
        next_one = asyncio.ensure_future(collect(engine.generate(request("next", 3, 5))))
        await asyncio.sleep(0)
        await harness.progress(engine, 3)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await harness.progress(engine, 5)
        return await next_one

    assert len(run(scenario()).ids) == 5


def _without(weights: dict, name: str) -> dict:
    return {key: value for key, value in weights.items() if key != name}


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda w: _without(w, NORM), NORM),
        (lambda w: {**w, "model.extra": torch.zeros(3)}, "model.extra"),
        (lambda w: {**w, NORM: torch.zeros(3)}, NORM),
        (lambda w: {**w, NORM: w[NORM].to(torch.float64)}, NORM),
    ],
    ids=["missing", "unknown", "shape", "dtype"],
)
def test_a_failed_update_leaves_the_old_weights(run, harness, make_model, damage, says):
    models = {v: make_model(seed=v) for v in range(3)}
    how = harness.kv_on_update[0]
    engine = harness.make(models[0], kv_on_update=how)
    r = request("r", 5, 100, seed=2)

    async def scenario() -> Output:
        stream = asyncio.ensure_future(collect(engine.generate(r)))
        await harness.progress(engine, 8)
        with pytest.raises(WeightsError, match=says):
            await engine.update_weights(LocalWeights(1, damage(models[1].state_dict())))
        assert engine.stats().version == 0
        await harness.progress(engine, 8)
        await engine.update_weights(LocalWeights(2, models[2].state_dict()))
        await harness.progress(engine, sys.maxsize)
        return await stream

    output = run(scenario())
    assert set(output.versions) == {0, 2}
    expected = EXPECTED[how](models, r, output)
    assert np.abs(output.logprobs - expected).max() < harness.logprob_tolerance


def test_tokens_are_told_as_they_are_sampled(run, harness, make_model):
    """Where the engine can: those that there are have been told, and nothing else."""
    engine, told = harness.make(make_model()), []
    r = replace(request("r", 5, 60), tell=told.extend)

    async def scenario() -> tuple[int, Output]:
        stream = asyncio.ensure_future(collect(engine.generate(r)))
        await harness.progress(engine, 5)
        some = len(told)
        await harness.progress(engine, sys.maxsize)
        return some, await stream

    some, output = run(scenario())
    assert told == (output.ids if harness.tells else [])
    assert (some >= 5) is harness.tells


def test_run_drives_the_engine(run, harness, make_model):
    """Under `run`, requests come and go, weights change, and everything holds; then `close` ends what is
    open."""
    models = {v: make_model(seed=v) for v in range(3)}
    engine = harness.make(models[0], capacity=4, kv_on_update="recompute")
    requests = [request(f"r{i}", 2 + i, 40, seed=i) for i in range(12)]

    async def scenario() -> list[Output]:
        running = asyncio.create_task(engine.run())
        streams = [asyncio.ensure_future(collect(engine.generate(r))) for r in requests]
        for version in (1, 2):
            await engine.update_weights(LocalWeights(version, models[version].state_dict()))
        outputs = await asyncio.gather(*streams)
        late = asyncio.ensure_future(collect(engine.generate(request("late", 3, 100))))
        await asyncio.sleep(0)
        await engine.close()
        for task in (late, running):
            with pytest.raises(EngineError, match="closed"):
                await task
        with pytest.raises(EngineError, match="closed"):
            engine.generate(request("later", 3))
        return outputs

    for r, output in zip(requests, run(scenario()), strict=True):
        assert len(output.ids) == 40
        assert np.abs(output.logprobs - recomputed(models, r, output)).max() < harness.logprob_tolerance
