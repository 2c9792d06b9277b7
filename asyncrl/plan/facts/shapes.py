"""Sizes of models that the presets and the documentation name, so that a run can be planned where neither the
model nor the hub can be reached.

Source: the config.json that each model is published with (huggingface.co/NAME/blob/main/config.json).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asyncrl.plan.facts.model import FoundModel, ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": tied,
    }


_QWEN3 = {
    "0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "8B": _qwen3(4096, 12_288, 36, 32, tied=False),
}
_LLAMA31_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131_072,
}
SHAPES: dict[str, dict[str, Any]] = {
    **{f"Qwen/Qwen3-{n}": shape | {"max_position_embeddings": 40_960} for n, shape in _QWEN3.items()},
    **{f"Qwen/Qwen3-{n}-Base": shape | {"max_position_embeddings": 32_768} for n, shape in _QWEN3.items()},
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": _LLAMA31_8B | {"num_labels": 1},
}


def known_model(key: str, path: str) -> FoundModel | None:
    """The model of that hub name, by its known shape; None where it is not known."""
    if path not in SHAPES:
        return None
    return FoundModel(ModelSource(key, path, False, ""), None, _config(SHAPES[path]))


def _config(shape: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(**shape)
