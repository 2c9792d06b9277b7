"""Sequences and tokens that are not learnt from, whatever the objective."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asyncrl.objective.kl import ESTIMATORS
from asyncrl.objective.policy import PolicyTokens, log_ratio, over_sequences


def rejected(
    tokens: PolicyTokens, measure: str, above: float | None, below: float | None, only_negative: bool
) -> Tensor:
    """bool[N]: the tokens of sequences whose distance from mu to pi_theta is greater than `above` or less
    than `below` (nats; None for no such bound).

        distance = sum, mean or max over the sequence of k1 = -log r, k2 = (log r)² / 2 or k3 = r - 1 - log r

    measure: such as `mean_k1`, the geometric mean's -log; `sum_k1` is that of the sequence's ratio. With
    only_negative a rejected sequence loses only its tokens of A < 0.

    Source: as a bound on the sequence's ratio, Liu, Li et al. 2025, "When speed kills stability"; `mean_k1`
    with only_negative: off-policy sequence masking, DeepSeek-AI 2025 (V3.2, arXiv 2512.02556).
    """
    how, _, estimator = measure.partition("_")
    log_r = log_ratio(tokens.logprobs.detach(), tokens.behavior_logprobs.detach(), tokens.mask)
    distance = over_sequences(ESTIMATORS[estimator](log_r).value, tokens, how)
    lost = torch.zeros_like(tokens.mask)
    if above is not None:
        lost = lost | (distance > above)
    if below is not None:
        lost = lost | (distance < below)
    if only_negative:
        lost = lost & (tokens.known_advantages < 0)
    return lost & tokens.mask


def most_uncertain(entropies: Tensor, mask: Tensor, share: float) -> Tensor:
    """bool[T]: of the tokens of a mini-batch where `mask` (bool[T]) is set those with the highest entropy
    (float[T]), `share` of them: none below the quantile 1 - share.

    Source: Wang et al. 2025, "Beyond the 80/20 rule" (arXiv 2506.01939).
    """
    ordered = entropies[mask].sort().values
    if not len(ordered):
        return mask
    return mask & (entropies >= ordered[math.ceil((len(ordered) - 1) * (1 - share))])
