"""Sizes of the models that the recipes in `configs/` name, so that a recipe can be planned where neither the
model nor the hub can be reached. From the models' own config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asyncrl.runtime.model_facts import FoundModel, ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_QWEN3_4B: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
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
    "Qwen/Qwen3-4B": _QWEN3_4B | {"max_position_embeddings": 40_960},
    "Qwen/Qwen3-4B-Base": _QWEN3_4B | {"max_position_embeddings": 32_768},
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": _LLAMA31_8B | {"num_labels": 1},
}


def planned_model(key: str, path: str) -> FoundModel | None:
    """The model of that hub name, by its known shape; None where it is not known."""
    if path not in SHAPES:
        return None
    return FoundModel(ModelSource(key, path, False, ""), None, _config(SHAPES[path]))


def _config(shape: dict[str, Any]) -> PreTrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(**shape)
