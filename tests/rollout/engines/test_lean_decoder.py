"""Decoding by plain functions: whom it serves, and that it computes what modules do, version by version."""

import numpy as np
import pytest
import torch
from families import tiny
from transformers import AutoConfig, AutoModelForCausalLM

from asyncrl.rollout.engines.torch import lean_decoder
from asyncrl.rollout.engines.torch.lean_decoder import LeanDecoder
from asyncrl.rollout.engines.torch.probe import exact_decoder
from asyncrl.rollout.engines.torch.slot_decoder import SlotDecoder
from asyncrl.rollout.engines.torch.weights import LiveWeights
from asyncrl.weights.source import untied

MAX_LENGTH = 40
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
MODELS = {
    "qwen2 tied": ("qwen2", {"num_key_value_heads": 2, "tie": True}),
    "qwen3 biased": ("qwen3", {"num_key_value_heads": 3, "attention_bias": True}),
    "llama biased": ("llama", {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", {"num_key_value_heads": 1, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16}}),
    "mistral": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral, window never outgrown": ("mistral", {"num_key_value_heads": 2, "sliding_window": MAX_LENGTH}),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def make(name, seed=0, dtype=torch.float32):
    family, settings = MODELS[name]
    settings = SHAPE | settings
    config = AutoConfig.for_model(family, **settings, tie_word_embeddings=settings.pop("tie", False))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def decoded(decoder) -> torch.Tensor:
    """Logits [steps, rows, V] of ragged rows, filled, copied and decoded."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 97, (4, MAX_LENGTH))
    known = np.array([5, 1, 12])
    decoder.fill(np.array([0, 1, 2]), tokens[:3, :12], known)
    decoder.copy([2], [3], 12)
    positions, rows = np.array([*known, 12]), np.arange(4)
    steps = range(MAX_LENGTH - 12)
    return torch.stack([decoder.decode(tokens[rows, positions + i], positions + i).clone() for i in steps])


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["by pointer", "in place"])
@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_the_modules_do_under_every_version(name, cuda_graphs):
    model, by_modules = make(name), SlotDecoder(make(name), 4, MAX_LENGTH)
    lean = exact_decoder(model, 4, MAX_LENGTH, cuda_graphs=cuda_graphs)
    assert isinstance(lean, LeanDecoder)
    live = LiveWeights(model, in_place=cuda_graphs)
    seen = []
    for version in range(3):
        fresh = make(name, seed=version).state_dict()
        live.adopt(live.stage({n: t.clone() for n, t in untied(fresh).items()}))
        by_modules.model.load_state_dict(fresh)
        seen.append(decoded(lean))
        torch.testing.assert_close(seen[-1], decoded(by_modules), rtol=1e-5, atol=1e-5)
    assert (seen[0] - seen[1]).abs().max() > 0.1 < (seen[1] - seen[2]).abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_rounds_as_the_modules_do(dtype):
    lean = exact_decoder(make("qwen3 biased", dtype=dtype), 4, MAX_LENGTH)
    assert isinstance(lean, LeanDecoder)
    by_modules = SlotDecoder(make("qwen3 biased", dtype=dtype), 4, MAX_LENGTH)
    torch.testing.assert_close(decoded(lean), decoded(by_modules))


def test_rows_keep_what_they_hold_while_the_cache_is_laid_out_anew():
    """Rows filled, copied and decoded in any order, beside a cache that stays as it is for CUDA graphs."""
    rng, slots, longest = np.random.default_rng(0), 5, 150
    packed = LeanDecoder(make("qwen3 biased"), slots, longest)
    fixed = SlotDecoder(make("qwen3 biased"), slots, longest, cuda_graphs=True)
    held, rooms = np.zeros(slots, np.int64), [packed.cache.room]
    for turn in range(30):
        rows = rng.permutation(slots)[: rng.integers(1, slots)]
        lengths = rng.integers(1, longest - 8 if turn % 10 == 0 else 12, len(rows))
        source, target = (int(row) for row in rng.permutation(slots)[:2])
        held[rows] = lengths
        tokens = rng.integers(0, 97, (slots, longest))
        for decoder in (packed, fixed):
            decoder.fill(rows, tokens[: len(rows), : lengths.max()], lengths)
            decoder.copy([source], [target], int(held[source]))
        held[target] = held[source]
        for _ in range(7):
            active = slice(rng.integers(1, slots + 1))
            inputs = tokens[active, 0], held[active].copy()
            torch.testing.assert_close(packed.decode(*inputs), fixed.decode(*inputs), rtol=1e-5, atol=1e-5)
            held[active] += 1
        held = np.minimum(held, longest - 8)
        rooms.append(packed.cache.room)
    assert min(rooms) < 32 < 96 < max(rooms)
    assert len(set(rooms)) > 3


@pytest.mark.parametrize("shape", [(1, 8, 16), (3, 16, 40), (8, 64, 700)])
def test_many_small_products_are_those_of_one_batch(shape):
    rows, inner, columns = shape
    a, b = torch.randn(5, 2, rows, inner), torch.randn(5, 2, columns + 3, inner)[:, :, :columns]
    expected = torch.einsum("xhmk,xhnk->xhmn", a.double(), b.double()).float()
    torch.testing.assert_close(lean_decoder._products(a, b.transpose(2, 3)), expected)


def patched():
    model = make("mistral")
    forward = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda hidden: 2 * forward(hidden)
    return model


@pytest.mark.parametrize(
    "model", [lambda: tiny("mistral"), lambda: tiny("gemma"), patched], ids=["window", "family", "patched"]
)
def test_other_models_go_through_their_modules(model):
    assert type(exact_decoder(model(), 4, MAX_LENGTH)) is SlotDecoder


def test_it_is_not_taken_where_it_would_be_wrong(monkeypatch):
    """A rotation by other pairs, as some checkpoints of the same shapes want it."""

    def interleaved(x, cos, sin):
        pairs = torch.stack((x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos + pairs * sin

    monkeypatch.setattr(lean_decoder, "_rotated", interleaved)
    assert type(exact_decoder(make("llama biased"), 4, MAX_LENGTH)) is SlotDecoder
