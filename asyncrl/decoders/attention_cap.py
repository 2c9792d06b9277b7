"""Attention whose scores are softly capped (Gemma 2, arXiv:2408.00118), which not every kernel computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def attention_cap(config: PreTrainedConfig) -> float | None:
    """What no attention score of such a model gets beyond, by size; None where they are as they come."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def keep_cap(model: PreTrainedModel) -> None:
    """Switch a model that caps its scores to `eager`: transformers' `sdpa`, its default, leaves the cap out
    without a word."""
    if attention_cap(model.config) is not None and model.config._attn_implementation != "eager":
        model.set_attn_implementation("eager")
