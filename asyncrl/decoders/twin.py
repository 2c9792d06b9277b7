"""A small model of the same kind as another one: its class and settings, but few layers, narrow, and random.

What a kind of model does with a row of sequences, or with its logits, can be tried out on its twin: on any
machine, before its weights are there, and with windows so short that a few tokens reach beyond them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from asyncrl.decoders.attention_cap import keep_cap

log = logging.getLogger(__name__)

_HIDDEN, _INNER, _HEADS, _HEAD_DIM, _VOCABULARY, _WINDOW = 32, 48, 4, 8, 97, 8
_MOST_PARAMETERS = 10_000_000
_AT_MOST = {
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "num_kv_shared_layers": 0,
    "num_nextn_predict_layers": 0,
}
_SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), _VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), _HIDDEN),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner"), _INNER),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), _HEADS),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "qk_nope_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("index_head_dim", "linear_key_head_dim", "linear_value_head_dim"), _HEAD_DIM),
    **dict.fromkeys(("linear_head_dim", "hidden_size_per_layer_input"), _HEAD_DIM),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_latent_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), _WINDOW),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), _WINDOW),
    **dict.fromkeys(("mamba_expand", "expand"), 2),
    "mamba_d_ssm": 2 * _HIDDEN,
    "time_step_rank": 2,
    "qk_rope_head_dim": 4,
    "rotary_dim": 4,
    "index_topk": 4,
    "index_n_heads": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "block_multiple_of": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
"""Settings of transformers' decoders that are sizes, and change nothing but them. Together they fit."""
_KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers")
_ON_CPU = {"sdpa": "sdpa", "eager": "eager", "varlen": None}
"""Attention kernels that the CPU has, and what to load a model with for each."""


def small_twin(config: PreTrainedConfig, attention: str | None = None) -> PreTrainedModel | None:
    """The twin of models with this configuration, float32 on the CPU, the same every time; None where none
    can be made. attention: the kernel, where the CPU has it; else what computes the model right."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            shrunken = shrink(config.get_text_config())
            with torch.device("meta"):
                shell = AutoModelForCausalLM.from_config(shrunken)
            if sum(parameter.numel() for parameter in shell.parameters()) > _MOST_PARAMETERS:
                raise ValueError("it has sizes that are not known here, and is not small")
            loaded_with = _ON_CPU.get(attention)
            twin = AutoModelForCausalLM.from_config(
                shrunken, dtype=torch.float32, attn_implementation=loaded_with
            ).eval()
            for parameter in twin.parameters():  # away from 0 and 1, where layers do nothing
                parameter += 0.1 * torch.randn_like(parameter)
            if attention not in _ON_CPU:
                keep_cap(twin)
            elif attention != loaded_with:
                twin.set_attn_implementation(attention)
            twin(input_ids=torch.zeros((1, 2), dtype=torch.int64), use_cache=False)
    except Exception as error:  # noqa: BLE001 - whatever its code raises, there is no twin
        log.info("no small twin of %s can be made: %s", type(config).__name__, error)
        return None
    return twin


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a twin: a layer of each kind, two at least."""
    settings = config.to_dict()
    layers, heads = config.num_hidden_layers, getattr(config, "num_attention_heads", None)
    per_layer = {
        key: value for key, value in settings.items() if isinstance(value, list) and len(value) == layers
    }
    chosen = _one_of_each(list(zip(*per_layer.values(), strict=True))) if per_layer else []
    chosen = chosen if len(chosen) > 1 else list(range(min(2, layers)))
    small = settings | _small_sizes(settings, heads)
    small |= {key: [value[i] for i in chosen] for key, value in per_layer.items()}
    small |= {key: len(chosen) for key in _LAYER_COUNTS if isinstance(settings.get(key), int)}
    if exceptions := settings.get("per_layer_config"):
        of_layer = {int(key): value | _small_sizes(value, heads) for key, value in exceptions.items()}
        small["per_layer_config"] = {n: of_layer[i] for n, i in enumerate(chosen) if i in of_layer}
    if "qk_rope_head_dim" in settings:  # of latent attention, whose rotary part has a size of its own
        small["head_dim"] = small["qk_rope_head_dim"]
    return type(config).from_dict(small)


def _small_sizes(settings: dict[str, Any], heads: int | None) -> dict[str, Any]:
    """In place of those in `settings`. heads: of the model's queries."""
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if key == "rope_parameters":
            small[key] = _unscaled(value)
        elif key == "head_dim" or (key.endswith("token_id") and value is not None):
            small[key] = _SIZES.get(key, 0)
        elif type(value) is not int:
            continue
        elif key in _SIZES:
            small[key] = _SIZES[key]
        elif key in _AT_MOST:
            small[key] = min(value, _AT_MOST[key])
        elif key in _KV_HEAD_COUNTS:
            small[key] = _HEADS if value == heads else min(2, value)
    return small


def _one_of_each(layers: list[tuple[Any, ...]]) -> list[int]:
    """Where each kind of layer comes first."""
    return [i for i, layer in enumerate(layers) if layer not in layers[:i]]


def _unscaled(rope: Any) -> Any:
    """Rotary embeddings without what stretches them, whose lists are as long as a head."""
    if not isinstance(rope, dict):
        return rope
    inner = {key: _unscaled(value) for key, value in rope.items()}
    return inner | {"rope_type": "default"} if "rope_type" in rope else inner
