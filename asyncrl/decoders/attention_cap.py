"""Soft-capped attention scores (Gemma 2, arXiv:2408.00118), which not every kernel supports."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def attention_cap(config: PreTrainedConfig) -> float | None:
    """The largest magnitude of such a model's attention scores; None if they are not capped."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def keep_cap(model: PreTrainedModel) -> None:
    """Switch a model that caps its scores to `eager`: transformers' default, `sdpa`, silently drops the
    cap."""
    if attention_cap(model.config) is not None and model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
