"""The trainer's processes, as the training step sees them: who am I, and sums over all."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """All ranks do the same calls in the same order. Each holds the whole batch and computes its share."""

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, on each of them, in place."""


class OneRank:
    rank = 0
    size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


def gathered(ranks: Ranks, tensor: Tensor) -> Tensor:
    """[size, ...]: the tensors of all ranks, on each of them."""
    slots = torch.zeros(ranks.size, *tensor.shape, dtype=tensor.dtype, device=tensor.device)
    slots[ranks.rank] = tensor
    return ranks.sum(slots)
