"""Sizes of a decoder's layers, which may differ from layer to layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def largest_of_layers(config: PreTrainedConfig, name: str) -> int | None:
    """The largest value of the setting `name` in any layer; None if no layer has it. Families with a value
    per layer use a list, or transformers' configs per layer."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    return max(max(_several(getattr(layer, name, None)), default=0) for layer in layers) or None


def _several(value: Any) -> list[int]:
    """A number, a list of numbers, or None, as a list."""
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if one is not None]
