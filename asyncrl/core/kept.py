"""Kept sets: the tokens that a token was sampled among, where sampling left some of the vocabulary out.

Top-p, top-k and a shortest length renormalise what is sampled from. Policies that are renormalised over the
same set have a ratio of 1 where they are equal (sampling-mask replay: DeepSeek-V3.2, arXiv 2512.02556,
section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_LISTED = 4096
"""Top-p without top-k samples among so many tokens at most, so that a kept set is never larger."""


@dataclass(frozen=True, slots=True)
class KeptSets:
    """The sets of N tokens.

    ids: int32[K], the sets one after the other; a set lists what it keeps, or, each as ~id, what it leaves
    out. sizes: int32[N], the ids of each; a set without any is the whole vocabulary.
    """

    ids: NDArray[np.int32]
    sizes: NDArray[np.int32]

    @staticmethod
    def of(sets: Sequence[NDArray[np.int32]]) -> KeptSets | None:
        """From a set (int32[k]) for each token; None where all are whole."""
        sizes = np.array([len(ids) for ids in sets], np.int32)
        return KeptSets(np.concatenate(sets).astype(np.int32, copy=False), sizes) if sizes.any() else None

    @staticmethod
    def join(parts: Iterable[tuple[KeptSets | None, int]]) -> KeptSets | None:
        """Of consecutive parts, each with its number of tokens; None where all are whole."""
        given = list(parts)
        if all(kept is None for kept, _ in given):
            return None
        return KeptSets(
            np.concatenate([np.empty(0, np.int32) if kept is None else kept.ids for kept, _ in given]),
            np.concatenate([np.zeros(n, np.int32) if kept is None else kept.sizes for kept, n in given]),
        )

    @staticmethod
    def without(left_out: Sequence[int], tokens: int, of: int) -> KeptSets | None:
        """Of `of` tokens, of which the first `tokens` were sampled among all but `left_out`."""
        tokens = min(tokens, of)
        sizes = np.where(np.arange(of) < tokens, len(left_out), 0).astype(np.int32)
        return KeptSets(~np.tile(np.array(left_out, np.int32), tokens), sizes) if sizes.any() else None

    def take(self, index: NDArray[np.int64]) -> KeptSets:
        """The sets of these tokens, in this order."""
        sizes = self.sizes[index]
        ends, starts = np.cumsum(sizes), np.cumsum(self.sizes) - self.sizes
        within = np.arange(sizes.sum()) - np.repeat(ends - sizes, sizes)
        return KeptSets(self.ids[np.repeat(starts[index], sizes) + within], sizes)

    def problem(self, token_ids: NDArray[np.int32]) -> str | None:
        """Why these cannot be the sets of these tokens (int32[N]); None where they can."""
        n = len(token_ids)
        if len(self.sizes) != n or (self.sizes < 0).any() or self.sizes.sum() != len(self.ids):
            return f"the kept sets have {len(self.sizes)} sizes for {n} tokens, and {len(self.ids)} ids"
        owner = np.repeat(np.arange(n), self.sizes)
        inverted = np.bincount(owner[self.ids < 0], minlength=n)
        mixed = (inverted > 0) & (inverted < self.sizes)
        if mixed.any():
            return f"token {mixed.argmax()} has a kept set that lists both what it keeps and what not"
        itself = np.where(self.ids < 0, ~self.ids, self.ids) == token_ids[owner]
        listed = np.bincount(owner[itself], minlength=n) > 0
        outside = (self.sizes > 0) & (listed == (inverted > 0))
        if outside.any():
            return f"token {outside.argmax()} was sampled from outside its own kept set"
        return None
