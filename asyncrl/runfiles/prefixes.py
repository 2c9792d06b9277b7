"""Beginnings of responses, given to rows that a whole group has failed (`data.hints.give: prefix`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from asyncrl.config import Config
from asyncrl.core.records import GroupSummary
from asyncrl.data.prompts import Prompt
from asyncrl.runfiles.store import LedgerStore
from asyncrl.wire.codec import decode_group


class Prefixes:
    """Of the responses of a column, or of the policy's own last successes, which it notes in the store.

    Source: PrefixRL, Setlur et al. 2026 (arXiv 2601.18795).
    """

    def __init__(self, config: Config, prompts: Sequence[Prompt], store: LedgerStore[bytes]) -> None:
        assert config.data.hints is not None
        self._hints = config.data.hints
        self._seed = config.run.seed
        self._longest = config.rollout.max_new_tokens
        self._prompts = prompts
        self._store = store

    def begun(self, prompt: Prompt, group_id: int) -> Prompt:
        """The prompt with what this group's responses begin with: a share of the response that is known,
        which the group's number draws, and never all of it."""
        if prompt.hint_of is None:
            return prompt
        whole = self._store.success_of(prompt.hint_of) if prompt.prefix_ids is None else prompt.prefix_ids
        if whole is None:
            return prompt
        share = np.random.default_rng([self._seed, group_id]).uniform(*self._hints.share)
        return replace(prompt, prefix_ids=whole[: math.floor(share * min(len(whole), self._longest))])

    def finished(self, row: int, summary: GroupSummary, payload: bytes) -> None:
        """A group of a row was handed in."""
        above = self._hints.success_above
        if self._hints.column is not None or max(summary.rewards) <= above:
            return
        prompt = self._prompts[row]
        group = decode_group(payload)
        success = next(t for t in group.trajectories if t.reward > above)
        response = success.token_ids[len(prompt.prompt_ids) :]  # with the prefix that it was given
        self._store.remember(row if prompt.hint_of is None else prompt.hint_of, response)


def make_prefixes(config: Config, prompts: Sequence[Prompt], store: LedgerStore[bytes]) -> Prefixes | None:
    """None where none are given."""
    hints = config.data.hints
    return None if hints is None or hints.give != "prefix" else Prefixes(config, prompts, store)
