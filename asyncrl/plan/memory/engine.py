"""What an engine and a reward model need of their GPUs, or of host memory where they compute there. Pure."""

from __future__ import annotations

from asyncrl.config import Config, RewardModelConfig
from asyncrl.plan.facts.model import DTYPE_BYTES, ModelFacts
from asyncrl.plan.facts.reward import RewardModelFacts
from asyncrl.plan.memory.activations import forward_bytes
from asyncrl.plan.memory.trainer import CUDA_CONTEXT_BYTES
from asyncrl.rollout.engines.vllm.kv_cache import (
    GPU_BLOCK_TOKENS,
    room_bytes,
    shared_gpu_bytes,
    workspace_bytes,
)
from asyncrl.rollout.engines.vllm.launch import PREFILL_TOKENS
from asyncrl.weights.canary import CANARY_TOKENS

_FLOAT32 = 4


def engine_parts(
    config: Config,
    model: ModelFacts | None,
    longest_tokens: int,
    card_bytes: int | None,
    *,
    shares_gpu: bool = False,
) -> tuple[dict[str, int], dict[str, int]]:
    """Of one engine, on each of its GPUs: where it computes, and in host memory besides.

    longest_tokens: of prompt and response. card_bytes: the memory of its GPUs, None where it computes on the
    CPU. shares_gpu: whether others compute there.
    """
    rollout = config.rollout
    weights = model.parameters * DTYPE_BYTES[config.model.dtype] if model is not None else 0
    if rollout.engine == "paced":
        return {}, {}
    if rollout.engine == "http":  # the servers' memory is their operators' business
        return {"incoming weights": weights}, {}
    if rollout.engine == "vllm" and card_bytes is not None:
        # Each of its ranks stages a whole version.
        staged = {"incoming weights": rollout.tensor_parallel_size * weights}
        return _vllm_parts(config, model, longest_tokens, card_bytes, shares_gpu=shares_gpu), staged
    assert model is not None
    parts = {
        "weights": weights,
        "incoming weights": weights,
        "KV cache": rollout.slots * _kept_bytes(model, longest_tokens),
        "logits": 2 * _FLOAT32 * rollout.slots * model.vocab_size,
    }
    if card_bytes is None:
        return parts, {}
    return parts | {"CUDA": CUDA_CONTEXT_BYTES}, {"incoming weights": weights}


def _kept_bytes(model: ModelFacts, longest_tokens: int) -> int:
    """Of one request of the embedded engine, at most."""
    kept = longest_tokens * model.kv_bytes_per_token + _FLOAT32 * model.state_values
    # Decoding by rows keeps what a row goes on from beside what it has been filled with.
    return kept if model.by_rows is None else 2 * kept


def _vllm_parts(
    config: Config, model: ModelFacts | None, longest_tokens: int, card_bytes: int, *, shares_gpu: bool
) -> dict[str, int]:
    """vLLM takes its share of a GPU whole, and fills what is left of it with its KV cache: as its own
    profiling finds it where it is alone, and as it is told where it is not."""
    rollout = config.rollout
    share = rollout.vllm.gpu_memory_utilization
    if model is None:
        return {"weights, KV cache and graphs": int(share * card_bytes)}
    value_bytes = DTYPE_BYTES[config.model.dtype]
    weights = -(-model.parameters * value_bytes // rollout.tensor_parallel_size)
    workspace = workspace_bytes(
        prefill_tokens=max(rollout.vllm.prefill_tokens or PREFILL_TOKENS["cuda"], rollout.slots),
        sequences=max(rollout.slots, CANARY_TOKENS),
        hidden_size=model.layer.hidden_size,
        vocab_size=model.vocab_size,
        value_bytes=value_bytes,
    )
    of_rank = -(-model.kv_bytes_per_token // rollout.tensor_parallel_size)
    room = room_bytes(rollout.slots, longest_tokens, GPU_BLOCK_TOKENS, of_rank)
    kv_cache = shared_gpu_bytes(
        card_bytes=card_bytes,
        utilization=share,
        weights_bytes=weights,
        workspace_bytes=workspace,
        room_bytes=room if shares_gpu else card_bytes,
    )
    return {"weights": weights, "KV cache": max(0, kv_cache), "workspace": workspace}


def reward_model_parts(
    settings: RewardModelConfig, facts: RewardModelFacts, longest_tokens: int, on_gpu: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Of a reward model, which scores under a mask, padding included: where it computes, and in host memory
    besides."""
    value_bytes = DTYPE_BYTES[settings.dtype]
    weights = facts.parameters * value_bytes
    tokens = max(settings.batch_tokens, longest_tokens)
    parts = {
        "weights": weights,
        "activations": forward_bytes(facts.layer, tokens, value_bytes, longest_tokens),
    }
    # The weights go through host memory as they are loaded.
    return (parts | {"CUDA": CUDA_CONTEXT_BYTES}, {"loading": weights}) if on_gpu else (parts, {})
