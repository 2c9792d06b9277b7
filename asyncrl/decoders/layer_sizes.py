"""Sizes of a decoder's layers, where these may differ from layer to layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def largest_of_layers(config: PreTrainedConfig, name: str) -> int | None:
    """The setting `name`, the largest of any layer; None where none has it. Families that give each layer its
    own value write a list, or let transformers keep them apart."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return max(max(_several(getattr(layer, name, None)), default=0) for layer in layers) or None


def _several(value: Any) -> list[int]:
    """Of a number, a list of numbers, or none."""
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if one is not None]
