"""The held-out prompts that models are scored on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from asyncrl.config import Config
from asyncrl.data.load import load_prompts
from asyncrl.data.prompts import PromptSet
from asyncrl.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def held_out(config: Config, tokenizer: PreTrainedTokenizerBase | None = None) -> PromptSet:
    """Those of `evaluation.sets`, one set after the other; else the last `data.held_out_rows` rows of each
    dataset, and all of it where none are held out. Raises `ConfigError`."""
    data = config.data if config.scored_sets is None else config.scored_sets
    _, kept_out = load_prompts(data, tokenizer or load_tokenizer(config.model)).split(data.held_out_rows)
    return kept_out


def first(prompts: PromptSet, limit: int | None) -> PromptSet:
    """Up to `limit` prompts of each set."""
    kept, counts = [], [0] * len(prompts.counts())
    for prompt in prompts:
        counts[prompt.dataset] += 1
        if limit is None or counts[prompt.dataset] <= limit:
            kept.append(prompt)
    return PromptSet(tuple(kept))
