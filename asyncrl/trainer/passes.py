"""Forward passes over a whole batch without a gradient: one number for each trained token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from asyncrl.trainer.packing.pack import MicroBatch
from asyncrl.trainer.packing.shares import MiniBatch, micro_batches
from asyncrl.trainer.ranks import Ranks
from asyncrl.work import did_one, working


@torch.no_grad()
def over_tokens(
    minis: Sequence[MiniBatch], tokens: int, ranks: Ranks, compute: Callable[[MicroBatch], Tensor]
) -> Tensor:
    """float32[T]: `compute` (float[N]) of every trained token of the batch of T `tokens`, 0 elsewhere.

    In the training pass's own packing, so that what is computed again there is the same to the last bit.
    """
    result = None
    with working("micro-batches of a forward pass over the batch", micro_batches(minis)):
        for mini in minis:
            for micro in mini.micros:
                values = compute(micro).float()
                if result is None:
                    result = torch.zeros(tokens, device=values.device)
                result[micro.token_index] = values
                did_one()
    assert result is not None
    return ranks.sum(result)
