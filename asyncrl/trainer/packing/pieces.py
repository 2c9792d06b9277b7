"""Where the sequences of a micro-batch begin and end, for kernels that compute every sequence by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.trainer.packing.device import OnDevice


@dataclass(frozen=True, slots=True)
class SharedPrompts(OnDevice):
    """Who sees whom between the pieces of units that share a prompt: every token after it sees all of it.

    In such unit u, the tokens `queries[query_starts[u] : query_starts[u + 1]]` follow the prompt
    `keys[key_starts[u] : key_starts[u + 1]]`.
    """

    queries: Tensor
    """int64[Q]: places in the rows laid end to end."""
    keys: Tensor
    """int64[K]."""
    query_starts: Tensor
    """int32[U + 1]."""
    key_starts: Tensor
    """int32[U + 1]."""
    longest_queries: int
    """No unit has more tokens after its prompt."""
    longest_keys: int
    """No shared prompt is longer."""


@dataclass(frozen=True, slots=True)
class Pieces(OnDevice):
    """A micro-batch whose rows are laid end to end, cut into pieces that attend causally to themselves: a
    sequence, a shared prompt, what follows it in one sequence, or padding."""

    starts: Tensor
    """int32[P + 1]: piece p is `starts[p] .. starts[p + 1]`, and has a token at least."""
    longest: int
    """No piece is longer."""
    shared: SharedPrompts | None
    """None where no two sequences share a prompt."""


def cut(blocks: NDArray[np.int64], branches: NDArray[np.int64]) -> Pieces:
    """The pieces of rows. blocks, branches: int64[R, L], as in `Branches`."""
    unit_begins = np.ones(blocks.shape, dtype=np.bool_)
    unit_begins[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
    piece_begins = unit_begins.copy()
    piece_begins[:, 1:] |= branches[:, 1:] != branches[:, :-1]
    starts = np.append(np.flatnonzero(piece_begins), blocks.size)
    units = np.cumsum(unit_begins) - 1
    return Pieces(_starts(starts), _longest(np.diff(starts)), _shared(units, branches.flatten()))


def whole_rows(rows: int, tokens: int, device: torch.device) -> Pieces:
    """The pieces of `rows` sequences of `tokens` tokens each."""
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * tokens
    return Pieces(starts, max(2, tokens), None)


def _shared(units: NDArray[np.int64], branches: NDArray[np.int64]) -> SharedPrompts | None:
    """units, branches: int64[R·L], the unit of each token, numbered from 0, and its branch."""
    number = int(units[-1]) + 1
    after = np.bincount(units[branches > 0], minlength=number)
    prompt = np.bincount(units[branches == 0], minlength=number)
    sharing = (after > 0) & (prompt > 0)
    if not sharing.any():
        return None
    queries = np.flatnonzero(sharing[units] & (branches > 0))
    keys = np.flatnonzero(sharing[units] & (branches == 0))
    after, prompt = after[sharing], prompt[sharing]
    return SharedPrompts(
        torch.from_numpy(queries),
        torch.from_numpy(keys),
        _starts(np.append(0, np.cumsum(after))),
        _starts(np.append(0, np.cumsum(prompt))),
        _longest(after),
        _longest(prompt),
    )


def _starts(starts: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(starts.astype(np.int32))


def _longest(lengths: NDArray[np.int64]) -> int:
    """A bound for the kernel's grid; at least 2, since for queries of length 1 it takes the layout of
    decoding."""
    return max(2, int(lengths.max()))
