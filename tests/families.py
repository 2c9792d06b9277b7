"""A tiny random model of every family of decoders that people train by reinforcement learning.

Names are transformers' model types. Layers of every kind that a family has are there (windows and experts,
linear attention and full, ...), and every parameter is away from the value that it is born with, so that a
layer that is computed wrongly shows. Windows and chunks are shorter than the tests' sequences.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

VOCABULARY = 97
WINDOW = 8
"""Tokens of a window or chunk of attention."""

_DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_WINDOWED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
_STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}

FAMILIES: dict[str, dict] = {
    "qwen2": _DENSE,
    "qwen2_moe": _DENSE | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3": _DENSE,
    "qwen3_moe": _DENSE | _EXPERTS,
    "qwen3_next": _DENSE | _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": _DENSE | _LINEAR,
    "qwen3_5_moe_text": _DENSE | _EXPERTS | _LINEAR | {"shared_expert_intermediate_size": 16},
    "llama": _DENSE,
    "llama4_text": _DENSE
    | {
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": WINDOW,
        "floor_scale": 4,
    },
    "gemma": _DENSE,
    "gemma2": _DENSE
    | _WINDOWED
    | {"query_pre_attn_scalar": 8, "final_logit_softcapping": 4.0, "attn_logit_softcapping": 0.5},
    "gemma3_text": _DENSE | _WINDOWED | {"query_pre_attn_scalar": 8},
    "gemma4_text": _DENSE
    | _WINDOWED
    | {
        "global_head_dim": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": 4.0,
    },
    "mistral": _DENSE | {"sliding_window": WINDOW},
    "ministral": _DENSE | _WINDOWED,
    "ministral3": _DENSE,
    "mixtral": _DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "phi": _DENSE,
    "phi3": _DENSE,
    "phimoe": _DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm": _DENSE,
    "glm4": _DENSE,
    "glm4_moe": _DENSE | _ROUTED,
    "glm4_moe_lite": _DENSE | _ROUTED | _LATENT,
    "glm_moe_dsa": _DENSE
    | _ROUTED
    | _LATENT
    # Many heads: a key that all of them score 0, which the positive part does to half of the products, would
    # tie with others.
    | {"first_k_dense_replace": 1, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 16},
    "olmo2": _DENSE,
    "olmo3": _DENSE | _WINDOWED,
    "olmoe": _DENSE | _EXPERTS,
    "smollm3": _DENSE | {"no_rope_layers": [1, 0]},
    "granite": _DENSE | {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "granitemoehybrid": _DENSE
    | _STATES
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
        "logits_scaling": 4.0,
    },
    "lfm2": _DENSE | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "lfm2_moe": _DENSE | _EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "nemotron_h": _DENSE
    | _ROUTED
    | {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "moe_shared_expert_intermediate_size": 16,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "gpt_oss": _DENSE | _WINDOWED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": _DENSE | _ROUTED | _LATENT | {"first_k_dense_replace": 1},
    "kimi_linear": _DENSE
    | _EXPERTS
    | _LATENT
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts_per_token": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "mlp_layer_types": ["dense", "sparse"],
        "q_lora_rank": None,
    },
    "ernie4_5": _DENSE,
    "ernie4_5_moe": _DENSE | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "cohere": _DENSE,
    "cohere2": _DENSE | _WINDOWED,
    "seed_oss": _DENSE,
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "gpt_neox": _DENSE,
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "word_embed_proj_dim": 32,
        "pad_token_id": 0,
    },
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "use_mambapy": False},
}
"""The settings of each family's model, by model type."""


def tiny_config(family: str) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **FAMILIES[family])


def tiny(family: str, seed: int = 0) -> nn.Module:
    """The family's model: float32, in evaluation mode, the same for the same seed. By `eager` where attention
    scores are capped, which transformers' `sdpa` does not do."""
    torch.manual_seed(seed)
    config = tiny_config(family)
    kernel = "eager" if getattr(config, "attn_logit_softcapping", None) else None
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=kernel).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model
