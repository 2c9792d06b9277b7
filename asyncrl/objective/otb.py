"""A baseline for each place in a group's responses."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from asyncrl.objective.advantages import CONSTANT_STD
from asyncrl.objective.gae import Steps, gae


def otb(steps: Steps, score_norms: Tensor, group_ids: Tensor) -> Tensor:
    """Optimal token baseline: each place in the responses of a group has a baseline of its own, in which a
    response counts by how uncertain its tokens have been until there.

        G_t = R_t + G_{t+1},   W_t = W_{t-1} + 1 - 2·pi(y_t) + sum over the vocabulary of pi²
        A_t = G_t - sum of W_t·G_t / sum of W_t over the responses of the group with a t-th token

    steps: `values` are not read. score_norms: float[T], what W grows by at each token: the squared norm of
    the gradient of log pi(y_t) by the logits, under the policy that the step starts from. group_ids: int[S].
    Returns float[T], 0 where not sampled, and where no other response has a t-th token.

    Source: Li et al. 2026 (arXiv 2602.07078).
    """
    at = steps.mask.nonzero()[:, 0]
    sequences, norms = steps.sequences[at], score_norms[at].double()
    returns = gae(replace(steps, values=torch.zeros_like(score_norms, dtype=torch.float64)))[0][at]
    lengths = torch.bincount(sequences, minlength=len(steps.rewards))
    first = (lengths.cumsum(0) - lengths)[sequences]
    place = torch.arange(len(at), device=at.device) - first
    sums = norms.cumsum(0)
    weights = (sums - (sums - norms)[first]).clamp(min=1e-8)  # where all are sure, each counts the same
    _, same = torch.unique(group_ids[sequences] * (len(at) + 1) + place, return_inverse=True)
    of_places = torch.zeros(len(at), 2, dtype=torch.float64, device=at.device)
    of_places = of_places.index_add(0, same, torch.stack([weights * returns, weights], dim=1))[same]
    advantages = returns - of_places[:, 0] / of_places[:, 1]
    noise = CONSTANT_STD * returns.abs().clamp(min=1)
    out = torch.zeros_like(score_norms)
    out[at] = torch.where(advantages.abs() > noise, advantages, 0.0).to(out.dtype)
    return out
