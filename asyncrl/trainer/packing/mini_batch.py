"""Who computes what of a mini-batch: its sequences packed into micro-batches, and these dealt to the
ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.objective.normalise import Totals
from asyncrl.trainer.packing.batch import FlatBatch, count_trained
from asyncrl.trainer.packing.pack import (
    Layout,
    MicroBatch,
    empty_micro_batch,
    make_micro_batch,
    pack_lengths,
    row_capacity,
)
from asyncrl.trainer.packing.prefix import Unit, shared_units, single_units
from asyncrl.trainer.ranks import Ranks
from asyncrl.work import did_one, working

ONE_ROW = sys.maxsize
"""As `Packing.row_tokens`: each micro-batch is one row."""
ROUNDING_STEPS = 64
"""The length of such a row is padded to a multiple of this part of the token budget, for allocators and
kernels to see few shapes. Micro-batches are filled to the brim, so that most have one of two or three lengths
then, and the padding is at most 1.6% of a full one, 0.8% on average."""


@dataclass(frozen=True, slots=True)
class Packing:
    """How a model's micro-batches are packed.

    max_tokens: of one micro-batch. row_tokens: shortest rows into which to pack; `ONE_ROW` for kernels that
    compute each sequence of a row by itself, `ONE_SEQUENCE` for models that cannot keep them apart.
    shares_prefixes: whether sequences that begin alike are computed together. hidden_size: of the model, for
    the cost of a token beside that of attention.
    """

    max_tokens: int
    row_tokens: int
    shares_prefixes: bool
    hidden_size: int
    device: torch.device

    @property
    def one_row(self) -> bool:
        return self.row_tokens == ONE_ROW

    @property
    def round_to(self) -> int:
        """Rows are padded to a multiple of so many tokens."""
        return max(1, self.max_tokens // ROUNDING_STEPS) if self.one_row else 1


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """What one optimizer update sees: this rank's micro-batches, and counts over all ranks."""

    on_host: Sequence[MicroBatch]
    device: torch.device
    totals: Totals
    sequences: NDArray[np.int64]
    """int64: which of the batch, on all ranks."""

    def micros(self) -> Iterator[MicroBatch]:
        """Each is moved to the device when its turn comes."""
        return (micro.to(self.device) for micro in self.on_host)


def count_micros(minis: Sequence[MiniBatch]) -> int:
    """Micro-batches of this rank."""
    return sum(len(mini.on_host) for mini in minis)


def mini_batch(
    flat: FlatBatch, sequences: NDArray[np.int64], packing: Packing, ranks: Ranks, max_length: int
) -> MiniBatch:
    """This rank's share of `sequences` (int64, indices into the batch). `max_length`: as in `Totals`. Every
    rank gets the same number of micro-batches, since all must take part in every forward and backward
    pass."""
    needed = flat.trained_lengths()
    lengths = np.zeros(flat.sequences, dtype=np.int64)
    lengths[sequences] = needed[sequences]
    if packing.shares_prefixes:
        capacity = row_capacity(int(lengths.max()), packing.max_tokens, packing.row_tokens)
        units = shared_units(flat, lengths, capacity)
    else:
        units = single_units(lengths)
    tokens = [unit.tokens for unit in units]
    layouts = pack_lengths(tokens, packing.max_tokens, packing.row_tokens, packing.round_to)
    dealt = deal([cost(layout, units, lengths, packing) for layout in layouts], ranks.size)
    mine = [make_micro_batch(flat, lengths, units, layouts[i]) for i in dealt[ranks.rank]]
    most = max(map(len, dealt))
    mine += [empty_micro_batch() for _ in range(most - len(mine))]
    totals = Totals(count_trained(flat, sequences), int((lengths > 0).sum()), max_length)
    return MiniBatch(mine, packing.device, totals, sequences)


def cost(layout: Layout, units: Sequence[Unit], lengths: NDArray[np.int64], packing: Packing) -> int:
    """Of a pass over the layout, in arbitrary units: a token costs a decoder layer about 24·H² operations in
    its matrices and 4·H in attention to each token that it is compared with (Korthikanti et al. 2022, arXiv
    2205.05198), which is as 6·H to the number of those: the row's tokens, or only those that it sees."""
    if packing.one_row:
        compared = sum(seen_pairs(units[number], lengths) for row in layout.rows for number in row)
    else:
        compared = len(layout.rows) * layout.row_tokens**2
    return layout.padded_tokens * 6 * packing.hidden_size + compared


def seen_pairs(unit: Unit, lengths: NDArray[np.int64]) -> int:
    """The number of pairs in the unit of a token and a token that it sees."""
    prefix = unit.prefix_tokens
    rests = lengths[list(unit.members)] - prefix
    return int(prefix * (prefix + 1) // 2 + (rests * (rests + 1) // 2 + rests * prefix).sum())


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Which items each rank gets: about equal sums of `costs`, and numbers that differ by at most one.

    The most expensive first, each to the rank with the least to do among those that still have room (Graham
    1969's longest-processing-time rule, with a bound on the number).
    """
    most = -(-len(costs) // ranks)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0] * ranks
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < most), key=lambda r: (sums[r], r))
        dealt[rank].append(item)
        sums[rank] += costs[item]
    return dealt


@torch.no_grad()
def over_tokens(
    minis: Sequence[MiniBatch], tokens: int, ranks: Ranks, compute: Callable[[MicroBatch], Tensor]
) -> Tensor:
    """float32[T]: `compute` (float[N]) of every trained token of the batch of T `tokens`, 0 elsewhere.

    In the training pass's own packing, so that what is computed again there is the same to the last bit.
    """
    result = None
    with working("micro-batches of a forward pass over the batch", count_micros(minis)):
        for mini in minis:
            for micro in mini.micros():
                values = compute(micro).float()
                if result is None:
                    result = torch.zeros(tokens, device=values.device)
                result[micro.token_index] = values
                did_one()
    assert result is not None
    return ranks.sum(result)


def batch_logprobs(
    policy: Callable[..., Any], minis: Sequence[MiniBatch], ids: Tensor, ranks: Ranks
) -> Tensor:
    """float32[T]: the log-probability of every trained token of the batch (ids: int64[T]), 0 elsewhere."""
    return over_tokens(minis, len(ids), ranks, lambda micro: policy(micro, ids[micro.token_index])[0])
