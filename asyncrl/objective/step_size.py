"""Smaller steps on batches of which little counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ess_sums(log_ratios: Tensor) -> Tensor:
    """float64[3]: the logarithms of B, Σw and Σw² of the raw ratios w = e^log_ratios (float[B]): no ratio is
    clamped, and none overflows."""
    log_w = log_ratios.detach().double()
    return torch.stack([x.logsumexp(0) for x in (torch.zeros_like(log_w), log_w, 2 * log_w)])


def ess_share(sums: Tensor) -> float:
    """(Σw)² / (B Σw²), of the parts of a batch whose `ess_sums` are float64[K, 3]: the effective sample size
    as a share of B, in (0, 1]; 1 for none, 0 where every w is 0.

    Source: Kong 1992.
    """
    log_count, log_sum_w, log_sum_w2 = sums.logsumexp(0).tolist()
    if math.isinf(log_sum_w):
        return float(math.isinf(log_count))
    return math.exp(2 * log_sum_w - log_sum_w2 - log_count)


def vcpo_lr_scale(log_ratios: Tensor, *, ess_base: float = 1.0) -> float:
    """What to multiply the learning rate by: sqrt(ESS / (B · ess_base)), at most 1.

    log_ratios: float[B], log pi_prox - log mu of the whole batch's B units. The paper's units are
    trajectories (`sequence_sums` of the tokens' log-ratios); tokens are a milder choice. ess_base: the share
    ESS / B of data for which the learning rate was chosen.

    Source: VCPO, Huang et al. 2026 (arXiv 2602.17616).
    """
    return math.sqrt(min(1.0, ess_share(ess_sums(log_ratios)[None]) / ess_base))


def sequence_sums(log_ratios: Tensor, sequences: Tensor, mask: Tensor) -> Tensor:
    """float64[S]: the sum of log_ratios (float[T]) over the unmasked tokens (mask: bool[T]) of each sequence
    that has one (sequences: int64[T])."""
    _, index = torch.unique(sequences[mask], return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1 if len(index) else 0, dtype=torch.float64, device=mask.device)
    return sums.index_add(0, index, log_ratios[mask].double())
