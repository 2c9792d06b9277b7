"""Objectives that keep to a trust region by other means than PPO's clip: second moment, divergence, soft
gate."""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.objective.policy import (
    PolicyTerms,
    PolicyTokens,
    left_out,
    log_ratio,
    r_ratio,
    score,
    u_ratio,
    w_ratio,
)


def m2po(tokens: PolicyTokens) -> PolicyTerms:
    """M2PO: no clip; the mini-batch's most extreme tokens are left out (`m2po_mask`).

        loss = -M·r·A,   M in {0, 1}

    Tokens left out stay in the denominator of the mean.

    Source: Zheng, Zhao, Chen 2025 (arXiv 2510.01161). Raises `ValueError` without `tokens.kept`.
    """
    out = left_out(tokens)
    return PolicyTerms(torch.where(out, 0.0, -r_ratio(tokens) * tokens.known_advantages), out)


def m2po_mask(tokens: PolicyTokens, *, max_second_moment: float = 0.04) -> Tensor:
    """bool[T]: which tokens of a mini-batch M2PO keeps. False where masked.

    Of the tokens that the update would drive further away (A > 0 and log r > 0, or A < 0 and log r < 0) as
    few as possible are left out, the largest (log r)² first, for the mean of (log r)² over the rest of them
    to be at most `max_second_moment`. Equal ones go together, so the outcome depends on no order. All other
    tokens are kept.

    Source: Zheng, Zhao, Chen 2025 (arXiv 2510.01161), where 0.04 is the default.
    """
    log_r = torch.where(tokens.mask, tokens.logprobs.detach() - tokens.behavior_logprobs, 0.0)
    driven_away = tokens.mask & (log_r * tokens.known_advantages > 0)
    squares = log_r[driven_away].double().square()
    ordered = squares.sort().values
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    within = int((means <= max_second_moment).sum())
    kept = tokens.mask.clone()
    if within < len(ordered):
        kept[driven_away] = squares < ordered[within]
    return kept


def dppo(tokens: PolicyTokens, *, prob_delta: float = 0.2, ratio_high: float = 20.0) -> PolicyTerms:
    """DPPO (its binary total-variation form): a token is left out when its probability, not its ratio, has
    moved too far in the direction of the update.

        gradient of -M·sg(min(r, ratio_high))·A·log pi_theta
        M = 0 where pi_theta - mu > prob_delta and A > 0, or pi_theta - mu < -prob_delta and A < 0; else 1

    Rare tokens may change by large ratios, which the clip of PPO forbids; `ratio_high` bounds what one of
    them may weigh.

    Source: Qi et al. 2026 (arXiv 2602.04879); the bound 20 is that of its implementation.
    """
    moved = _probability(tokens.logprobs, tokens.mask) - _probability(tokens.behavior_logprobs, tokens.mask)
    return _within(tokens, moved.abs() > prob_delta, ratio_high)


def dppo_kl(tokens: PolicyTokens, *, max_divergence: float = 0.05, ratio_high: float = 20.0) -> PolicyTerms:
    """DPPO in its binary KL form: as `dppo`, by the divergence of "this token or another" under mu from that
    under pi_theta.

        gradient of -M·sg(min(r, ratio_high))·A·log pi_theta
        D = mu·log(mu / pi_theta) + (1 - mu)·log((1 - mu) / (1 - pi_theta))
        M = 0 where D > max_divergence, and pi_theta > mu and A > 0, or pi_theta < mu and A < 0; else 1

    Source: Qi et al. 2026 (arXiv 2602.04879).
    """
    mask = tokens.mask
    pi, mu = (_probability(x, mask).double() for x in (tokens.logprobs, tokens.behavior_logprobs))
    log_r = log_ratio(tokens.logprobs.detach(), tokens.behavior_logprobs.detach(), mask)
    rest_pi, rest_mu = (1 - pi).clamp(min=1e-8), (1 - mu).clamp(min=1e-8)
    divergence = (1 - mu) * (rest_mu / rest_pi).log() - mu * log_r
    return _within(tokens, divergence > max_divergence, ratio_high)


def _within(tokens: PolicyTokens, far: Tensor, ratio_high: float) -> PolicyTerms:
    """The score-function loss weighted by r, less tokens that are `far` (bool[N]) and would go further."""
    log_r = log_ratio(tokens.logprobs.detach(), tokens.behavior_logprobs.detach(), tokens.mask)
    too_far = far & (log_r * tokens.known_advantages > 0)
    weight = torch.where(too_far, 0.0, log_r.exp().clamp(max=ratio_high))
    return PolicyTerms(-weight * tokens.known_advantages * score(tokens), too_far)


def sapo(
    tokens: PolicyTokens, *, tau_pos: float = 1.0, tau_neg: float = 1.05, behavior_cap: float = 2.0
) -> PolicyTerms:
    """SAPO: a soft gate in the place of the clip.

        f(u) = 4/tau · sigmoid(tau·(u - 1)),   tau = tau_pos where A > 0, tau_neg elsewhere
        loss = -sg(min(w, behavior_cap)) · f(u)·A

    f'(1) = 1, and the gradient fades as u leaves 1; it fades faster for A <= 0. The paper is on policy up to
    its mini-batches; w corrects for what is older, and is 1 with `objective.proximal: behavior`.

    Source: Gao et al. 2025 (arXiv 2511.20347).
    """
    advantages = tokens.known_advantages
    tau = torch.where(advantages > 0, advantages.new_tensor(tau_pos), tau_neg)
    gate = 4 / tau * torch.sigmoid(tau * (u_ratio(tokens) - 1))
    loss = -w_ratio(tokens).clamp(max=behavior_cap) * gate * advantages
    return PolicyTerms(loss, torch.zeros_like(tokens.mask))


def _probability(logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp(logprobs) without gradient, at most 1; 1 where masked."""
    return torch.where(mask, logprobs.detach(), 0.0).clamp(max=0.0).exp()
