"""Which models the embedded engine runs, and that it runs them exactly."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    ViTConfig,
)

from asyncrl.config import ModelConfig
from asyncrl.rollout.engines.base import GenerationRequest, SamplingParams
from asyncrl.rollout.engines.torch.decoder import UnsupportedModelError
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.rollout.engines.torch.model import build_model

SHAPE = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
EIGHT_WIDE = {**GROUPED, "head_dim": 8}
ARCHITECTURES = {
    "qwen3-tied": Qwen3Config(**EIGHT_WIDE, tie_word_embeddings=True),
    "qwen3-untied": Qwen3Config(**EIGHT_WIDE, tie_word_embeddings=False),
    "llama": LlamaConfig(**GROUPED),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "gpt2-learned-positions": GPT2Config(
        vocab_size=83, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2, eos_token_id=1
    ),
    "mistral-sliding": MistralConfig(**GROUPED, sliding_window=7),
    "gemma3-sliding-and-full": Gemma3TextConfig(
        **EIGHT_WIDE, sliding_window=7, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen2-sliding-second-layer": Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=7, max_window_layers=1
    ),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4),
}


def make(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


def generate(engine: TorchEngine, requests: list[GenerationRequest]):
    async def scenario():
        streams = [asyncio.ensure_future(anext(engine.generate(r))) for r in requests]
        while engine.stats().running + engine.stats().waiting:
            engine.step()
            await asyncio.sleep(0)
        return await asyncio.gather(*streams)

    return asyncio.run(scenario())


def requests_of(vocab_size: int, new_tokens: int = 24) -> list[GenerationRequest]:
    """Ragged prompts, each sampled once and once more greedily."""
    rng = np.random.default_rng(0)
    return [
        GenerationRequest(
            f"{length}-{temperature}",
            rng.integers(2, vocab_size, length).astype(np.int32),
            SamplingParams(new_tokens, temperature=temperature, seed=length),
        )
        for length in (1, 2, 6, 13, 21)
        for temperature in (0.8, 0.0)
    ]


@torch.no_grad()
def forward_logprobs(model, request: GenerationRequest, chunk) -> np.ndarray:
    ids = torch.tensor([*request.prompt_ids.tolist(), *chunk.token_ids.tolist()])[None]
    logits = model(ids, use_cache=False).logits[0].double()
    logprobs = (logits / (request.sampling.temperature or 1)).log_softmax(-1)
    start = len(request.prompt_ids)
    return logprobs[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_decoder_runs_exactly(architecture):
    """Past every attention window, in ragged rows with refills: logprobs of a plain forward."""
    config = ARCHITECTURES[architecture]
    reference = make(config)
    requests = requests_of(83)
    chunks = generate(TorchEngine(make(config), capacity=4, max_length=48), requests)
    for request, chunk in zip(requests, chunks, strict=True):
        assert len(chunk.token_ids) == 24
        assert np.abs(chunk.logprobs - forward_logprobs(reference, request, chunk)).max() < 1e-4
        if request.sampling.temperature == 0:
            ids = torch.from_numpy(request.prompt_ids.astype(np.int64))[None]
            expected = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=24,
                eos_token_id=None,
            )
            assert chunk.token_ids.tolist() == expected[0, len(request.prompt_ids) :].tolist()


def test_bfloat16_stays_near_the_forward():
    """bf16 rounds at 2^-8: logits of size ~10 are off by some 0.05 in either way of computing them."""
    config = ARCHITECTURES["qwen3-tied"]
    requests = requests_of(83)
    chunks = generate(TorchEngine(make(config, torch.bfloat16), capacity=4, max_length=48), requests)
    reference = make(config, torch.bfloat16)
    errors = [
        np.abs(c.logprobs - forward_logprobs(reference, r, c)) for r, c in zip(requests, chunks, strict=True)
    ]
    assert np.concatenate(errors).mean() < 0.05


def test_the_model_itself_computes_as_before():
    """The engine's attention equals sdpa outside the engine, so the adopted model can still be compared
    with."""
    config = ARCHITECTURES["gemma3-sliding-and-full"]
    model, plain = make(config), make(config)
    TorchEngine(model, capacity=2, max_length=48)
    ids = torch.arange(2, 32)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
        kept = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
    assert kept.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("config", "max_length", "says"),
    [
        (Qwen3Config(**EIGHT_WIDE), 257, "max_length=257.*256"),
        (
            LlamaConfig(
                **GROUPED,
                rope_parameters={
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 32,
                },
            ),
            64,
            "max_length=64 to 32",
        ),
    ],
    ids=["too long", "longrope"],
)
def test_models_that_would_go_wrong_are_refused(config, max_length, says):
    with pytest.raises(UnsupportedModelError, match=says):
        TorchEngine(make(config), capacity=2, max_length=max_length)


def test_a_model_that_ignores_position_ids_is_refused():
    model = make(ARCHITECTURES["llama"])
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: forward(
        *args, position_ids=torch.zeros_like(position_ids) if position_ids is not None else None, **kwargs
    )
    with pytest.raises(UnsupportedModelError, match="plain forward"):
        TorchEngine(model, capacity=2, max_length=48)


def test_weights_that_are_not_finite_are_refused():
    model = make(ARCHITECTURES["llama"])
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UnsupportedModelError, match="finite"):
        TorchEngine(model, capacity=2, max_length=48)


def save(config, path, generation: dict | None = None) -> ModelConfig:
    config.save_pretrained(path)
    if generation is not None:
        GenerationConfig(**generation).save_pretrained(path)
    return ModelConfig(path=str(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_build_makes_the_structure_in_its_dtype(tmp_path, dtype):
    """Also what no state dict holds: rotary frequencies equal those of the saved model, in float32."""
    model = make(ARCHITECTURES["qwen3-untied"], getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    built = build_model(ModelConfig(path=str(tmp_path), dtype=dtype))
    assert {p.dtype for p in built.parameters()} == {getattr(torch, dtype)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    buffers = dict(loaded.named_buffers())
    assert buffers
    for name, buffer in built.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name])
    built.load_state_dict(loaded.state_dict())
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        assert torch.equal(built(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (T5Config(vocab_size=83, d_model=32, num_layers=1, num_heads=2, d_kv=16), "encoder-decoder"),
        (ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4), "ViTConfig"),
    ],
    ids=["t5", "vit"],
)
def test_build_refuses_what_is_no_decoder(tmp_path, config, says):
    with pytest.raises(UnsupportedModelError, match=says) as refusal:
        build_model(save(config, tmp_path))
    assert str(tmp_path) in str(refusal.value)


def test_build_refuses_a_folder_without_a_model(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        build_model(ModelConfig(path=str(tmp_path)))
