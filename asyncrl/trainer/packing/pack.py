"""Units (single sequences, or several that share a prompt) into micro-batches under a token budget.

Several units share a row. Their position ids restart at 0, from which transformers builds block-diagonal
attention. What else a kernel needs to know comes along: which tokens share a prompt, of which a mask is made,
and where sequences begin and end. For models that cannot keep them apart, every sequence has a row of its
own, padded on the right. `pack_lengths` decides (pure, deterministic), `make_micro_batch` makes the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.core.kept import KeptSets
from asyncrl.trainer.packing.batch import FlatBatch
from asyncrl.trainer.packing.device import OnDevice
from asyncrl.trainer.packing.pieces import Pieces, cut
from asyncrl.trainer.packing.prefix import Branches, Unit

ONE_SEQUENCE = 0
"""As `min_row_tokens`: every item has a row of its own."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the units of one micro-batch go: rows of `row_tokens`, each with units (by number) in order."""

    rows: tuple[tuple[int, ...], ...]
    row_tokens: int

    @property
    def padded_tokens(self) -> int:
        return len(self.rows) * self.row_tokens


@dataclass(frozen=True, slots=True)
class MicroBatch(OnDevice):
    """One forward pass: R rows of L tokens, of which N predictions are trained on."""

    input_ids: Tensor
    """int64[R, L]."""
    position_ids: Tensor
    """int64[R, L]; restarts at 0 with every unit."""
    branches: Branches | None
    """For kernels that need a mask where sequences share a prompt; None where none do, and the restarting
    position ids say it all."""
    pieces: Pieces
    """For kernels that compute every sequence by itself."""
    predicted_from: Tensor
    """int64[N]: the place, in the R·L flattened, of the hidden state that predicts each trained token."""
    token_index: Tensor
    """int64[N]: each trained token's index in the `FlatBatch`."""
    kept: KeptSets | None = None
    """What each of the N was sampled among, on the host; None where that is the whole vocabulary for all."""


def empty_micro_batch() -> MicroBatch:
    """A forward pass for a rank that has nothing left to compute while others have: one token, none
    trained."""
    nothing = torch.zeros(0, dtype=torch.int64)
    token = torch.zeros((1, 1), dtype=torch.int64)
    return MicroBatch(token, token, None, cut(token.numpy(), token.numpy()), nothing, nothing)


def row_capacity(longest: int, max_tokens: int, min_row_tokens: int) -> int:
    """Length of rows that hold an item of `longest` tokens: at least `min_row_tokens`, so that short items
    share rows, but no more than the budget `max_tokens` unless the item itself is longer."""
    return max(longest, min(min_row_tokens, max_tokens))


def pack_lengths(
    lengths: Sequence[int], max_tokens: int, min_row_tokens: int = 1, round_to: int = 1
) -> list[Layout]:
    """First-fit-decreasing of items with `lengths` (all > 0) into micro-batches.

    A micro-batch takes the longest item left and as many rows of `row_capacity` as `max_tokens` pays for,
    padding counted. Short rows keep the cost of masked attention, quadratic in the row, small. An item
    longer than `max_tokens` goes alone. Rows are padded to a multiple of `round_to`, where `max_tokens`
    leaves room for it. With `ONE_SEQUENCE` items of like length come together, a row each.
    """
    left = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    layouts = []
    while left:
        capacity = row_capacity(lengths[left[0]], max_tokens, min_row_tokens)
        max_rows = max(1, max_tokens // capacity)
        if min_row_tokens == ONE_SEQUENCE:
            rows, left = [[item] for item in left[:max_rows]], left[max_rows:]
        else:
            rows, left = _fill_rows(left, lengths, capacity, max_rows)
        used = max(sum(lengths[i] for i in row) for row in rows)
        rounded = max(used, min(-(-used // round_to) * round_to, max_tokens // len(rows)))
        layouts.append(Layout(tuple(tuple(row) for row in rows), rounded))
    return layouts


def _fill_rows(
    items: list[int], lengths: Sequence[int], capacity: int, max_rows: int
) -> tuple[list[list[int]], list[int]]:
    """First fit of `items` into at most `max_rows` rows: the rows, and the items that found no place."""
    rows: list[list[int]] = []
    room: list[int] = []
    left = []
    for item in items:
        row = next((r for r, free in enumerate(room) if free >= lengths[item]), None)
        if row is None and len(rows) < max_rows:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        if row is None:
            left.append(item)
        else:
            rows[row].append(item)
            room[row] -= lengths[item]
    return rows, left


class _Rows:
    """The arrays of a micro-batch while they are filled."""

    def __init__(self, layout: Layout) -> None:
        shape = (len(layout.rows), layout.row_tokens)
        self.input_ids = np.zeros(shape, dtype=np.int64)
        self.position_ids = np.zeros(shape, dtype=np.int64)
        self.blocks = np.zeros(shape, dtype=np.int64)
        self.branches = np.zeros(shape, dtype=np.int64)
        self.predicted_from: list[NDArray[np.int64]] = []
        self.token_index: list[NDArray[np.int64]] = []

    def write(
        self, row: int, at: int, ids: NDArray[np.int64], *, position: int, block: int, branch: int
    ) -> int:
        """Put tokens at `row, at`, the first at `position` of its sequence; where they end."""
        end = at + len(ids)
        self.input_ids[row, at:end] = ids
        self.position_ids[row, at:end] = np.arange(position, position + len(ids))
        self.blocks[row, at:end] = block
        self.branches[row, at:end] = branch
        return end


def make_micro_batch(
    flat: FlatBatch, lengths: NDArray[np.int64], units: Sequence[Unit], layout: Layout
) -> MicroBatch:
    """The tensors of one micro-batch. `lengths[s]` tokens of sequence s go in (`FlatBatch.trained_lengths`).

    Padding is a unit of its own at the end of a row: it attends to nothing else, nothing attends to it, and
    no hidden state of it is read.
    """
    rows = _Rows(layout)
    for r, row in enumerate(layout.rows):
        at = 0
        for block, number in enumerate(row):
            at = _write_unit(rows, r, at, block, flat, lengths, units[number])
        rest = np.zeros(layout.row_tokens - at, dtype=np.int64)
        rows.write(r, at, rest, position=0, block=len(row), branch=0)
    shared = any(len(units[number].members) > 1 for row in layout.rows for number in row)
    branches = Branches(torch.from_numpy(rows.blocks), torch.from_numpy(rows.branches))
    index = np.concatenate(rows.token_index)
    return MicroBatch(
        torch.from_numpy(rows.input_ids),
        torch.from_numpy(rows.position_ids),
        branches if shared else None,
        cut(rows.blocks, rows.branches),
        torch.from_numpy(np.concatenate(rows.predicted_from)),
        torch.from_numpy(index),
        None if flat.kept is None else flat.kept.take(index),
    )


def _write_unit(
    rows: _Rows, r: int, at: int, block: int, flat: FlatBatch, lengths: NDArray[np.int64], unit: Unit
) -> int:
    """Prefix, then what follows it in each member; notes from where each trained token is predicted. The
    end."""
    prefix_at, prefix = at, unit.prefix_tokens
    row_at = r * rows.input_ids.shape[1]
    start = flat.offsets[unit.members[0]]
    at = rows.write(r, at, flat.token_ids[start : start + prefix], position=0, block=block, branch=0)
    for branch, s in enumerate(unit.members, start=1):
        start, end = flat.offsets[s], flat.offsets[s] + lengths[s]
        trained = np.flatnonzero(flat.loss_mask[start : end + 1])
        before = trained - 1
        rows.predicted_from.append(row_at + np.where(before < prefix, prefix_at, at - prefix) + before)
        rows.token_index.append(start + trained)
        ids = flat.token_ids[start + prefix : end]
        at = rows.write(r, at, ids, position=prefix, block=block, branch=branch)
    return at
