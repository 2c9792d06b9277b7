"""How uncertain the policy is of what was sampled, for `objective.otb`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from asyncrl.core.kept import KeptSets
from asyncrl.trainer.kernels.logprob import chunks
from asyncrl.trainer.lessons.divergence import log_probs
from asyncrl.trainer.models.policy import FusedHead
from asyncrl.trainer.packing.mini_batch import MiniBatch, over_tokens
from asyncrl.trainer.packing.pack import MicroBatch
from asyncrl.trainer.ranks import Ranks


def score_norms(policy: Callable[..., Any], minis: Sequence[MiniBatch], ids: Tensor, ranks: Ranks) -> Tensor:
    """float32[T]: of every trained token of the batch (ids: int64[T]), 0 elsewhere,

    |grad log pi(y)|² by the logits = 1 - 2·pi(y) + sum over the vocabulary of pi²
    """

    def of_micro(micro: MicroBatch) -> Tensor:
        logprobs, _, squares = policy(micro, ids[micro.token_index], sum_of_squares)
        norms: Tensor = (1 - 2 * logprobs.exp() + squares).clamp(min=0)
        return norms

    return over_tokens(minis, len(ids), ranks, of_micro)


@torch.no_grad()
def sum_of_squares(hidden: Tensor, head: FusedHead, kept: KeptSets | None) -> Tensor:
    """A `Reading`: of the probabilities, float32[N]. Without a gradient."""
    squares = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32)).to(
        hidden.device
    )
    for chunk in chunks(len(hidden), head.chunk_tokens):
        log_p = log_probs(hidden, head.weight, head.bias, head, kept, chunk)
        squares[chunk] = log_p.mul_(2).exp_().sum(-1)
    return squares
