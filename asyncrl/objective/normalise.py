"""From per-token values to one number, so that the gradient does not depend on how a batch is cut up."""

from __future__ import annotations

from torch import Tensor


def token_mean(values: Tensor, mask: Tensor, total_tokens: int) -> Tensor:
    """This part's share of the mean over all unmasked tokens: sum over unmasked of values[N] /
    `total_tokens`.

    mask: bool[N]. `total_tokens` counts the unmasked tokens of the whole mini-batch, over all micro-batches
    and ranks; the shares (and their gradients) then add up to the mean, whatever the packing (invariant 5).
    Token-level normalisation as in DAPO, Yu et al. 2025 (arXiv 2503.14476).
    """
    if total_tokens < 1:
        raise ValueError(
            f"the mini-batch has total_tokens={total_tokens}; there is nothing to take a mean of"
        )
    return values.where(mask, 0.0).sum() / total_tokens
