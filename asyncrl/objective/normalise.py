"""From per-token values to one number, so that the gradient does not depend on how a batch is cut up.

Each function gives a part's share. The counts are those of the whole mini-batch, over all micro-batches and
ranks, so the shares and their gradients add up to the whole (invariant 5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncrl.objective.catalogue import AGGREGATIONS


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts of the whole mini-batch, over all micro-batches and ranks."""

    tokens: int
    """Unmasked tokens."""
    sequences: int
    """Sequences that have an unmasked token."""
    max_length: int
    """Tokens that a response may have (a constant of the run: `rollout.max_new_tokens`)."""


def aggregate(name: str, values: Tensor, mask: Tensor, sequences: Tensor, totals: Totals) -> Tensor:
    """This part's share of the aggregate `name` of values (float[N]) over the unmasked tokens (mask: bool[N];
    sequences: int64[N], whole ones). Raises `ValueError` for an unknown name."""
    match name:
        case "token_mean":
            return token_mean(values, mask, totals.tokens)
        case "sequence_mean":
            return sequence_mean(values, mask, sequences, totals.sequences)
        case "constant_length":
            return constant_length(values, mask, totals.sequences, totals.max_length)
    raise ValueError(f"no aggregation is named {name!r}; there are: {', '.join(AGGREGATIONS)}")


def token_mean(values: Tensor, mask: Tensor, total_tokens: int) -> Tensor:
    """This part's share of the mean over all unmasked tokens: sum over unmasked of values[N] /
    `total_tokens`.

    Every token weighs the same, so long responses weigh more. As in DAPO, Yu et al. 2025 (arXiv 2503.14476).
    """
    return values.where(mask, 0.0).sum() / _positive(total_tokens, "total_tokens")


def sequence_mean(values: Tensor, mask: Tensor, sequences: Tensor, total_sequences: int) -> Tensor:
    """This part's share of the mean over sequences of the mean over each one's unmasked tokens.

    Every sequence weighs the same. As in GRPO, Shao et al. 2024 (arXiv 2402.03300).
    """
    _, index = torch.unique(sequences, return_inverse=True)
    lengths = torch.zeros(len(mask), dtype=values.dtype, device=values.device)
    lengths = lengths.index_add(0, index, mask.to(values.dtype))[index]
    means = (values.where(mask, 0.0) / lengths.clamp(min=1)).sum()
    return means / _positive(total_sequences, "total_sequences")


def constant_length(values: Tensor, mask: Tensor, total_sequences: int, max_length: int) -> Tensor:
    """This part's share of the sum over unmasked tokens / (`total_sequences` · `max_length`).

    The divisor depends on no response's length, so no length is favoured. As in Dr. GRPO, Liu et al. 2025
    (arXiv 2503.20783).
    """
    divisor = _positive(total_sequences, "total_sequences") * _positive(max_length, "max_length")
    return values.where(mask, 0.0).sum() / divisor


def _positive(count: int, name: str) -> int:
    if count < 1:
        raise ValueError(f"the mini-batch has {name}={count}; there is nothing to take a mean of")
    return count
