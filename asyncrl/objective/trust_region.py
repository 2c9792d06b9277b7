"""Objectives that keep to a trust region by other means than PPO's clip: second moment, divergence, soft
gate."""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.objective.policy import PolicyTerms, PolicyTokens, r_ratio, score, u_ratio, w_ratio


def m2po(tokens: PolicyTokens) -> PolicyTerms:
    """M2PO: no clip; the batch's most extreme tokens are left out (`m2po_mask`).

        loss = -M·r·A,   M in {0, 1}

    Tokens left out stay in the denominator of the mean.

    Source: Zheng, Zhao, Chen 2025 (arXiv 2510.01161). Raises `ValueError` without `tokens.kept`.
    """
    if tokens.kept is None:
        raise ValueError("m2po needs `kept`, the mask that m2po_mask makes of the whole batch")
    left_out = tokens.mask & ~tokens.kept
    loss = torch.where(left_out, 0.0, -r_ratio(tokens) * tokens.known_advantages)
    return PolicyTerms(loss, left_out)


def m2po_mask(
    log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, max_second_moment: float = 0.04
) -> Tensor:
    """bool[T]: which tokens of a batch M2PO keeps, by log_ratio = log pi_prox - log mu (float[T]), advantages
    (float[T]) and mask (bool[T]). False where masked.

    Of the tokens that the update would drive further away (A > 0 and log_ratio > 0, or A < 0 and
    log_ratio < 0) as few as possible are left out, the largest (log_ratio)² first, for the mean of
    (log_ratio)² over the rest of them to be at most `max_second_moment`. Equal ones go together, so the
    outcome depends on no order. All other tokens are kept.

    Source: Zheng, Zhao, Chen 2025 (arXiv 2510.01161), where 0.04 is the default.
    """
    driven_away = mask & (torch.where(mask, log_ratio * advantages, 0.0) > 0)
    squares = log_ratio[driven_away].double().square()
    ordered = squares.sort().values
    means = ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    within = int((means <= max_second_moment).sum())
    kept = mask.clone()
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
    advantages, mask = tokens.known_advantages, tokens.mask
    moved = _probability(tokens.logprobs, mask) - _probability(tokens.behavior_logprobs, mask)
    too_far = ((moved > prob_delta) & (advantages > 0)) | ((moved < -prob_delta) & (advantages < 0))
    weight = torch.where(too_far, 0.0, r_ratio(tokens).detach().clamp(max=ratio_high))
    return PolicyTerms(-weight * advantages * score(tokens), too_far)


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
