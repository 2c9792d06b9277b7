"""The held-out prompts that models are scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from asyncrl.config import Config
from asyncrl.data.load import load_prompts
from asyncrl.data.prompts import PromptSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def held_out(config: Config, tokenizer: PreTrainedTokenizerBase | None = None) -> PromptSet:
    """Those of `evaluation.sets`, one set after the other; else the last `data.held_out_rows` rows of each
    dataset, and all of it where none are held out. Those of `evaluation.suites` follow. Raises
    `ConfigError`."""
    if tokenizer is None:
        from asyncrl.data.tokenizer import load_tokenizer  # imports transformers

        tokenizer = load_tokenizer(config.model)
    if config.scored_sets is not None or not config.scored_by_rewards:
        return scored(config, tokenizer, PromptSet(()))
    _, kept_out = load_prompts(config.data, tokenizer).split(config.data.held_out_rows)
    return scored(config, tokenizer, kept_out)


def scored(config: Config, tokenizer: PreTrainedTokenizerBase, kept_out: PromptSet) -> PromptSet:
    """As `held_out`. kept_out: the held-out rows, which come first where they are scored."""
    found = kept_out if config.scored_sets is None and config.scored_by_rewards else PromptSet(())
    for data in config.scored_data:
        found = _followed(found, load_prompts(data, tokenizer))
    return found


def _followed(first: PromptSet, then: PromptSet) -> PromptSet:
    """Numbers and datasets go on."""
    row = max((prompt.index for prompt in first), default=-1) + 1
    dataset = max((prompt.dataset for prompt in first), default=-1) + 1
    numbered = (replace(p, index=row + p.index, dataset=dataset + p.dataset) for p in then)
    return PromptSet((*first, *numbered), (*first.skipped, *then.skipped))


def by_scorer(config: Config, prompts: PromptSet) -> tuple[PromptSet, PromptSet]:
    """Of these prompts, those that the run's own rewards score, and those of suites."""
    own = len(config.scored_by_rewards)
    return (
        PromptSet(tuple(p for p in prompts if p.dataset < own)),
        PromptSet(tuple(p for p in prompts if p.dataset >= own)),
    )


def shared(sets: Sequence[PromptSet]) -> list[PromptSet]:
    """Of the same rows, read for one model each, the prompts that all have: which are too long, is each
    tokenizer's to say, and models are compared by the same prompts."""
    if len(sets) == 1:
        return list(sets)
    known = [{(prompt.dataset, repr(prompt.prompt)) for prompt in prompts} for prompts in sets]
    everywhere = known[0].intersection(*known[1:])
    return [
        PromptSet(tuple(p for p in each if (p.dataset, repr(p.prompt)) in everywhere), each.skipped)
        for each in sets
    ]


def first(prompts: PromptSet, limit: int | None) -> PromptSet:
    """Up to `limit` prompts of each set."""
    kept, counts = [], [0] * len(prompts.counts())
    for prompt in prompts:
        counts[prompt.dataset] += 1
        if limit is None or counts[prompt.dataset] <= limit:
            kept.append(prompt)
    return PromptSet(tuple(kept), prompts.skipped)
