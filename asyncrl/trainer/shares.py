"""Who computes what of a mini-batch: its sequences packed into micro-batches, and these dealt to the
ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from asyncrl.objective.normalise import Totals
from asyncrl.trainer.batch import FlatBatch, count_trained
from asyncrl.trainer.packing import Layout, MicroBatch, assemble, empty, pack, row_capacity
from asyncrl.trainer.prefix import shared_units, single_units
from asyncrl.trainer.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Packing:
    """How a model's micro-batches are packed.

    max_tokens: of one micro-batch. row_tokens: shortest rows into which to pack. shares_prefixes: whether
    sequences that begin alike are computed together. hidden_size: of the model, for the cost of a token
    beside that of attention.
    """

    max_tokens: int
    row_tokens: int
    shares_prefixes: bool
    hidden_size: int
    device: torch.device


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """What one optimizer update sees: this rank's micro-batches, and counts over all ranks."""

    micros: list[MicroBatch]
    totals: Totals


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
    layouts = pack([unit.tokens for unit in units], packing.max_tokens, packing.row_tokens)
    dealt = deal([cost(layout, packing.hidden_size) for layout in layouts], ranks.size)
    mine = [assemble(flat, lengths, units, layouts[i]) for i in dealt[ranks.rank]]
    most = max(map(len, dealt))
    mine += [empty() for _ in range(most - len(mine))]
    totals = Totals(count_trained(flat, sequences), int((lengths > 0).sum()), max_length)
    return MiniBatch([micro.to(packing.device) for micro in mine], totals)


def cost(layout: Layout, hidden_size: int) -> int:
    """Of a pass over the layout, in arbitrary units: a token costs a decoder layer about 24·H² operations in
    its matrices and 4·L·H in attention to a row of L tokens (Korthikanti et al. 2022, arXiv 2205.05198),
    which is as 6·H to L."""
    return len(layout.rows) * layout.row_tokens * (6 * hidden_size + layout.row_tokens)


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Which items each rank gets: about equal sums of `costs`, and numbers that differ by at most one.

    The dearest first, each to the rank with the least to do among those that still have room (Graham 1969's
    longest-processing-time rule, with a bound on the number).
    """
    most = -(-len(costs) // ranks)
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0] * ranks
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < most), key=lambda r: (sums[r], r))
        dealt[rank].append(item)
        sums[rank] += costs[item]
    return dealt
