"""Sequences of a group share their prompt: it is computed once, and each response attends to it and to
itself.

The hidden states of a prefix depend on nothing after it, so sequences that begin alike have them in common,
and the gradients of all that follows add up in them. With `group_size` responses to a long prompt this saves
most of the prompt's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.trainer.packing.batch import FlatBatch
from asyncrl.trainer.packing.device import OnDevice


@dataclass(frozen=True, slots=True)
class Unit:
    """Sequences that are computed together: the first `prefix_tokens` tokens once, the rest of each after it.

    A single sequence is all prefix.
    """

    members: tuple[int, ...]
    prefix_tokens: int
    tokens: int
    """Tokens of the unit in all."""


def single_units(lengths: Sequence[int] | NDArray[np.int64]) -> list[Unit]:
    """Every sequence with `lengths[s] > 0` by itself."""
    return [Unit((s,), int(n), int(n)) for s, n in enumerate(lengths) if n > 0]


def shared_units(flat: FlatBatch, lengths: NDArray[np.int64], max_tokens: int) -> list[Unit]:
    """Sequences of a group that begin alike together, as many as fit in `max_tokens`.

    lengths: int64[S], the tokens of each sequence that a forward pass needs; sequences of length 0 are left
    out.
    """
    units: list[Unit] = []
    needed = np.flatnonzero(lengths)
    for group in np.unique(flat.group_ids[needed]):
        members = needed[flat.group_ids[needed] == group]
        units += _split(members, lengths, _common_prefix(flat, members, lengths), max_tokens)
    return units


def _split(
    members: NDArray[np.int64], lengths: NDArray[np.int64], prefix_tokens: int, max_tokens: int
) -> list[Unit]:
    """The members in order, a new unit whenever the next response does not fit."""
    if prefix_tokens == 0:
        return [Unit((int(s),), int(lengths[s]), int(lengths[s])) for s in members]
    open_units: list[tuple[list[int], int]] = []
    for s in members.tolist():
        rest = int(lengths[s]) - prefix_tokens
        if open_units and open_units[-1][1] + rest <= max_tokens:
            together, tokens = open_units[-1]
            open_units[-1] = ([*together, s], tokens + rest)
        else:
            open_units.append(([s], prefix_tokens + rest))
    return [
        Unit(tuple(together), prefix_tokens if len(together) > 1 else tokens, tokens)
        for together, tokens in open_units
    ]


def _common_prefix(flat: FlatBatch, members: NDArray[np.int64], lengths: NDArray[np.int64]) -> int:
    """Number of tokens with which all members begin, at most the length of the shortest."""
    shortest = int(lengths[members].min())
    starts = flat.offsets[members]
    tokens = flat.token_ids[starts[:, None] + np.arange(shortest)]
    differing = np.flatnonzero((tokens != tokens[0]).any(0))
    return int(differing[0]) if len(differing) else shortest


@dataclass(frozen=True, slots=True)
class Branches(OnDevice):
    """Who attends to whom when units share rows: a token sees the tokens before it (and itself) of its own
    unit that belong to the prefix or to its own response."""

    blocks: Tensor
    """int64[R, L]: the unit of each token."""
    branches: Tensor
    """int64[R, L]: 0 for tokens of the unit's prefix, else the number of the response."""

    def mask(self) -> Tensor:
        """bool[R, 1, L, L], True where query (dim 2) sees key (dim 3)."""
        query_block, key_block = self.blocks[:, :, None], self.blocks[:, None, :]
        query_branch, key_branch = self.branches[:, :, None], self.branches[:, None, :]
        mask = (query_block == key_block) & ((key_branch == 0) | (key_branch == query_branch))
        return mask.tril_()[:, None]


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as eager attention wants it: 0 where a query sees a key, else the lowest number of `dtype`."""
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)
