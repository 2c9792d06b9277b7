"""Decoding in the fixed shapes of CUDA graphs, on the CPU, where they are computed step by step."""

import numpy as np
import pytest
import torch
from families import tiny
from transformers import MistralConfig, MistralForCausalLM

from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
from asyncrl.rollout.engines.torch.batch import ContinuousBatch
from asyncrl.rollout.engines.torch.decoder import UnsupportedModelError
from asyncrl.rollout.engines.torch.graphs import StaticDecode
from asyncrl.weights.source import untied

MAX_LENGTH = 80


def batch_of(model, *, cuda_graphs, kv_on_update="keep"):
    return ContinuousBatch(
        model,
        capacity=5,
        max_length=MAX_LENGTH,
        kv_on_update=kv_on_update,
        stop_token_ids=(),
        prefill_tokens=64,
        cuda_graphs=cuda_graphs,
    )


def requests():
    """Twelve of unlike lengths, some up to the very last position, in pairs of equal prompts."""
    rng = np.random.default_rng(0)
    for i in range(12):
        if i % 2 == 0:
            prompt = rng.integers(0, 97, rng.integers(1, 70)).astype(np.int32)
        room = MAX_LENGTH - len(prompt)
        new_tokens = room if i in (3, 8) else min(room, 4 + 3 * i)
        yield GenerationRequest(str(i), prompt, SamplingParams(int(new_tokens), seed=i))


def outputs(batch, make_qwen3):
    """Everything that is sampled, with weights swapped in the middle."""
    for request in requests():
        batch.submit(request)
    found, steps = {}, 0
    while not batch.idle:
        for request, chunk in batch.step():
            found[request.request_id] = chunk
        steps += 1
        if steps in (7, 30):
            version = 1 + steps // 30
            fresh = {n: t.clone() for n, t in untied(make_qwen3(seed=version).state_dict()).items()}
            batch.swap(batch.weights.stage(fresh), version)
    return found


@pytest.mark.parametrize("kv_on_update", ["keep", "recompute"])
def test_padded_shapes_give_what_exact_ones_give(kv_on_update, make_qwen3):
    exact = outputs(batch_of(make_qwen3(), cuda_graphs=False, kv_on_update=kv_on_update), make_qwen3)
    padded = outputs(batch_of(make_qwen3(), cuda_graphs=True, kv_on_update=kv_on_update), make_qwen3)
    assert exact.keys() == padded.keys() == {str(i) for i in range(12)}
    for name, chunk in exact.items():
        assert np.array_equal(chunk.token_ids, padded[name].token_ids)
        assert np.allclose(chunk.logprobs, padded[name].logprobs, atol=1e-4)
        assert chunk.versions == padded[name].versions


def test_weights_stay_where_a_graph_reads_them(make_qwen3):
    model = make_qwen3()
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    batch = batch_of(model, cuda_graphs=True)
    fresh = untied(make_qwen3(seed=1).state_dict())
    batch.swap(batch.weights.stage(fresh), 1)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == places
    assert all(torch.equal(p, fresh[name]) for name, p in model.named_parameters())


def test_few_shapes_occur():
    shapes, padded = [], []

    def step(tokens, positions, width):
        assert len(tokens) == len(positions)
        shapes.append((len(tokens), width))
        padded.append(positions[positions != 7].tolist())
        return positions[:, None].expand(-1, 3).float()

    static = StaticDecode(step, slots=6, max_length=1000, device=torch.device("cpu"), width_step=16)
    for active, width in [(1, 1), (3, 128), (3, 129), (5, 1000), (6, 990), (4, 130)]:
        logits = static(torch.zeros(active, dtype=torch.long), torch.full((active,), 7), width)
        assert logits.tolist() == [[7.0] * 3] * active
    assert set(shapes) == {(1, 128), (4, 128), (4, 256), (6, 1000)}
    assert [999] in padded, "three rows were padded to four, with one at the last position"


def test_attention_windows_are_refused():
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=16,
    )  # fmt: skip
    batch_of(MistralForCausalLM(config).eval(), cuda_graphs=False)
    with pytest.raises(UnsupportedModelError, match=r"set rollout\.torch\.cuda_graphs=false"):
        batch_of(MistralForCausalLM(config).eval(), cuda_graphs=True)


def test_what_decodes_a_request_at_a_time_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"recurrent.*set rollout\.torch\.cuda_graphs=false"):
        batch_of(tiny("qwen3_5_text"), cuda_graphs=True)
