"""What the forward of a Hugging Face decoder takes."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def accepted(model: PreTrainedModel) -> frozenset[str]:
    """By name."""
    return frozenset(inspect.signature(model.forward).parameters)


def cache_name(model: PreTrainedModel) -> str | None:
    """What it calls its cache, as an argument and in its output; None where it has none."""
    names = accepted(model)
    return next((name for name in ("past_key_values", "cache_params", "state") if name in names), None)
