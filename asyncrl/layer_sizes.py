"""Sizes of a decoder's layers, where these may differ from layer to layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def largest_of_layers(config: PreTrainedConfig, name: str) -> int | None:
    """The setting `name`, the largest of any layer; None where none has it."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return max(getattr(layer, name, None) or 0 for layer in layers) or None
