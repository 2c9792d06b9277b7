"""The proximal policy pi_prox, the centre of the clip: where it comes from.

`recompute`: the policy at the start of the training step, by a forward pass over the batch before its first
update. `ewma`: an average of the weights of the past, by such a pass too. The others need no pass: they are
made of what a token brings along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor


def behavior(logprobs: Tensor, behavior_logprobs: Tensor, ages: Tensor) -> Tensor:
    """The behaviour policy itself: w = 1, and a decoupled objective becomes a naive one.

    All arguments and the result are [N], as for `loglinear`.
    """
    return behavior_logprobs


def loglinear(logprobs: Tensor, behavior_logprobs: Tensor, ages: Tensor) -> Tensor:
    """A-3PO: between the behaviour policy and the present one, the nearer to the latter the older the token.

        log pi_prox = alpha·log mu + (1 - alpha)·sg(log pi_theta),   alpha = 1 / (d + 1)

    logprobs: float[N], log pi_theta. behavior_logprobs: float[N]. ages: int64[N], staleness d in versions: d
    steps lie between mu and pi_prox, and one, the present, between pi_prox and pi_theta. A token of age 0 was
    sampled from the proximal policy itself, which so is mu. (The paper counts from the version that the step
    makes: its d is one more.)

    Source: Li, Wu, Shen 2025 (arXiv 2512.06547).
    """
    alpha = 1 / (ages + 1).to(logprobs.dtype)
    return alpha * behavior_logprobs + (1 - alpha) * logprobs.detach()


WITHOUT_PASS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "behavior": behavior,
    "loglinear": loglinear,
}
"""Functions of (logprobs, behavior_logprobs, ages), [N] each."""


@torch.no_grad()
def ewma_update(
    average: Iterable[Tensor], weights: Iterable[Tensor], updates: int, *, ewma_decay: float = 8 / 9
) -> None:
    """Move the average of the policy's weights, in place, after an update of them.

        average_n = sum over i <= n of decay^(n - i)·weights_i / sum over i <= n of decay^(n - i)

    weights_0 are the initial ones, which `average` holds at the start; `updates` is n, counting this update,
    from 1. The centre of mass of the average is decay / (1 - decay) updates ago.

    Source: PPO-EWMA, Hilton, Cobbe, Schulman 2022 (arXiv 2110.00641). Raises `ValueError` for updates < 1.
    """
    if updates < 1:
        raise ValueError(f"updates={updates}: count the update that the average follows, from 1")
    newest = (1 - ewma_decay) / (1 - ewma_decay ** (updates + 1))
    for mean, now in zip(average, weights, strict=True):
        mean.lerp_(now.to(mean.dtype), newest)
