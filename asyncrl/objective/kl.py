"""KL divergence of the trained policy from a reference, KL(pi_theta ‖ pi_ref), by its tokens.

With d = log pi_ref - log pi_theta of a token sampled from pi_theta, all three estimates have the KL at the
token's prefix (k2: nearly) as their mean; what they are worth as a loss differs (Liu et al. 2025, arXiv
2510.01555). A token that mu sampled is weighted by pi_theta / mu.

As a loss a token answers for its own prefix only: the gradient is that of the sum of the KLs at the prefixes,
these held fixed. The KL of whole sequences also counts which prefixes a token leads to: that is `k1_penalty`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from asyncrl.objective.policy import MAX_LOG_RATIO, ratio


class KlEstimate(NamedTuple):
    """value: float[N]. slope: float[N], the factor of grad log pi_theta when the estimate is a loss."""

    value: Tensor
    slope: Tensor


def k1(d: Tensor) -> KlEstimate:
    """value -d, slope 1 - d.

    Unbiased, but of high variance and of both signs. The slope is that of the KL at the prefix, sampling of
    the token included: its mean is that KL's exact gradient. (That of -d alone would be 1, which is noise of
    mean 0.) Off the reward, as `k1_penalty`, it gives the gradient of the KL of whole sequences.
    """
    return KlEstimate(-d, 1 - d)


def k2(d: Tensor) -> KlEstimate:
    """value d² / 2, slope -d.

    Never negative, of low variance and slightly biased as a value. As a loss its mean is the exact gradient
    of the KL at the prefix, with less noise than k1's.
    """
    return KlEstimate(d.square() / 2, -d)


def k3(d: Tensor) -> KlEstimate:
    """value e^d - 1 - d, slope 1 - e^d.

    Never negative and unbiased as a value. As a loss (GRPO's) it has the gradient of the reverse divergence
    KL(pi_ref ‖ pi_theta), which is that of the KL to first order in d only, and grows as e^d where the policy
    has left the reference.
    """
    return KlEstimate(torch.expm1(d) - d, -torch.expm1(d))


ESTIMATORS: Mapping[str, Callable[[Tensor], KlEstimate]] = {"k1": k1, "k2": k2, "k3": k3}


def kl_loss(
    name: str,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    behavior_logprobs: Tensor,
    mask: Tensor,
    *,
    ratio_cap: float = math.inf,
) -> Tensor:
    """float[N]: the estimate of each token as a loss, 0 where masked; all arguments are [N].

        value    sg(min(r, ratio_cap))·value(d)
        gradient sg(min(r, ratio_cap))·slope(d)·grad log pi_theta,    r = pi_theta / mu

    `ratio_cap` truncates the importance ratio, which makes the mean inexact off policy; infinity leaves it
    whole. d is clamped to ± `policy.MAX_LOG_RATIO`.

    Source: Schulman 2020, "Approximating KL divergence"; the gradients: Liu et al. 2025 (arXiv 2510.01555).
    """
    d = _difference(ref_logprobs, logprobs.detach(), mask)
    weight = ratio(logprobs.detach(), behavior_logprobs.detach(), mask).clamp(max=ratio_cap)
    estimate = ESTIMATORS[name](d)
    current = torch.where(mask, logprobs, 0.0)
    no_value = current - current.detach()
    return torch.where(mask, weight, 0.0) * (estimate.value + estimate.slope * no_value)


def k1_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """float[N], without gradient: -d = log pi - log pi_ref, to be taken off each token's reward; 0 where
    masked, and where pi is 0, of which nothing is learnt."""
    return -_difference(ref_logprobs, logprobs.detach(), mask & ~logprobs.detach().isneginf())


def teachers_advantage(penalty: Tensor, mask: Tensor) -> Tensor:
    """float[N]: d less its mean over the batch's tokens, d = log q - log pi = -`penalty`; 0 where masked.

    The mean is a baseline. A token has a part in it, which shortens the mean gradient by about 1/N for N
    tokens.

    Source: Lu 2025, "On-Policy Distillation" (Thinking Machines Lab), which takes off no mean.
    """
    return torch.where(mask, penalty[mask].mean() - penalty, 0.0)


def _difference(ref_logprobs: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    d = torch.where(mask, ref_logprobs.detach() - logprobs, 0.0)
    return d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
