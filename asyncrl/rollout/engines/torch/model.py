"""The engine's model: the structure of a Hugging Face decoder, mostly without its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from asyncrl.rollout.engines.spec import READS_WEIGHTS
from asyncrl.rollout.engines.torch.decoder import UnsupportedModelError
from asyncrl.weights.loaded_dtypes import as_loaded

if TYPE_CHECKING:
    from asyncrl.config import ModelConfig


def build_model(config: ModelConfig, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model that `config.path` describes, in `config.dtype` on `device`, with random weights: the real
    ones come with the first weight version, unless there will be none (`READS_WEIGHTS`). Raises
    `UnsupportedModelError` for what the engine cannot run."""
    structure = _read_config(config)
    if structure.is_encoder_decoder:
        raise UnsupportedModelError(
            f"model.path={config.path}: {structure.model_type} is an encoder-decoder; the engine runs "
            "decoder-only models"
        )
    how: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    how["trust_remote_code"] = config.trust_remote_code
    try:
        if READS_WEIGHTS in os.environ:
            model = AutoModelForCausalLM.from_pretrained(config.path, **how).to(device)
            return cast(PreTrainedModel, model.eval())
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(structure, **how)
    except ValueError as error:  # transformers: not a causal LM
        raise UnsupportedModelError(f"model.path={config.path}: {_first_sentence(error)}") from error
    as_loaded(model)
    return model.eval()


def refuse_unsupported(model: PreTrainedModel, max_length: int) -> None:
    """Raise `UnsupportedModelError` for what a model's class and configuration tell. The rest is for the
    probe."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name} is an encoder-decoder; the engine runs decoder-only models")
    text = model.config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        raise UnsupportedModelError(
            f"max_length={max_length} is over the {limit} positions of {name} (max_position_embeddings)"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    switch = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and switch is not None and max_length > switch:
        raise UnsupportedModelError(
            f"{name} changes all its rotary frequencies once a sequence passes {switch} tokens (longrope), "
            f"so cached keys would go wrong: lower max_length={max_length} to {switch}"
        )


def _read_config(config: ModelConfig) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        is_here = Path(config.path).exists()
        kind = "has no usable config.json" if is_here else "is neither a folder nor on the hub"
        raise UnsupportedModelError(f"model.path={config.path} {kind}: {_first_sentence(error)}") from error


def _first_sentence(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0]
