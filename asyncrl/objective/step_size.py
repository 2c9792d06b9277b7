"""Smaller steps on batches of which little counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ess_share(log_ratios: Tensor) -> float:
    """(Σw)² / (B Σw²) of the raw ratios w = e^log_ratios (float[B]): the effective sample size as a share of
    B, in (0, 1]; 1 for none. Computed in the log domain: no ratio is clamped, and none overflows.

    Source: Kong 1992.
    """
    if not len(log_ratios):
        return 1.0
    log_w = log_ratios.detach().double()
    return math.exp(float(2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)) - math.log(len(log_w)))


def vcpo_lr_scale(log_ratios: Tensor) -> float:
    """What to multiply the learning rate by: sqrt(ESS / B), in (0, 1].

    log_ratios: float[B], log pi_prox - log mu of the whole batch's B units. The paper's units are
    trajectories (`sequence_sums` of the tokens' log-ratios); tokens are a milder choice.

    Source: VCPO, Huang et al. 2026 (arXiv 2602.17616).
    """
    return math.sqrt(ess_share(log_ratios))


def sequence_sums(log_ratios: Tensor, sequences: Tensor, mask: Tensor) -> Tensor:
    """float64[S]: the sum of log_ratios (float[T]) over the unmasked tokens (mask: bool[T]) of each sequence
    that has one (sequences: int64[T])."""
    _, index = torch.unique(sequences[mask], return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=torch.float64, device=mask.device)
    return sums.index_add(0, index, log_ratios[mask].double())
