"""What every policy objective is given and gives, and the ratios that they are made of.

An objective is a function of `PolicyTokens` with keyword-only settings. It returns the loss of each token;
`asyncrl.objective.normalise` makes one number of them. `asyncrl.objective.catalogue` lists the objectives.

Throughout, `u = pi_theta / pi_prox`, `w = pi_prox / mu` and `r = pi_theta / mu` are ratios of the
probabilities of the sampled token, A is its advantage, and `sg` stops the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before `exp` (e^20 is about 5e8), so that no pair of finite
log-probabilities gives an infinite loss or gradient. Beyond it the gradient through the ratio is 0."""


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """What a policy objective sees of N tokens. Sequences are whole: all tokens of a sequence come in one
    call, in order.

    logprobs: float[N], of the sampled tokens under the policy being trained (carries the gradient).
    prox_logprobs: float[N], under the proximal policy, the centre of the clip.
    behavior_logprobs: float[N], under the distribution that sampled them (mu).
    advantages: float[N], of each token.
    mask: bool[N], which tokens count; elsewhere the other values may be anything (NaN and infinities too).
    sequences: int64[N], a number for the sequence that each token belongs to.
    ages: int64[N], staleness in versions.
    kept: bool[N], the objective's `batch_mask` at these tokens; None for objectives that have none.
    entropies: float[N], of the policy being trained at each token, with its gradient; None outside updates.
    """

    logprobs: Tensor
    prox_logprobs: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    sequences: Tensor
    ages: Tensor
    kept: Tensor | None = None
    entropies: Tensor | None = None

    @property
    def known_advantages(self) -> Tensor:
        """float[N]: `advantages`, and 0 where masked."""
        return torch.where(self.mask, self.advantages, 0.0)


class PolicyTerms(NamedTuple):
    """loss: float[N], 0 where masked. clipped: bool[N], the tokens whose gradient a clip or mask of the
    objective cut to 0."""

    loss: Tensor
    clipped: Tensor


def log_ratio(logprobs: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """logprobs - other [N], clamped to ± `MAX_LOG_RATIO`; 0, without gradient, where masked."""
    return torch.where(mask, logprobs - other, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def left_out(tokens: PolicyTokens) -> Tensor:
    """bool[N]: the unmasked tokens that `tokens.kept` leaves out. Raises `ValueError` without it."""
    if tokens.kept is None:
        raise ValueError("the objective needs `kept`, which its batch_mask makes of the whole mini-batch")
    return tokens.mask & ~tokens.kept


def ratio(logprobs: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """exp(logprobs - other) [N], with the log-ratio clamped to ± `MAX_LOG_RATIO`; 1, without gradient, where
    masked."""
    return log_ratio(logprobs, other, mask).exp()


def u_ratio(tokens: PolicyTokens) -> Tensor:
    """u = pi_theta / pi_prox [N], with the gradient of pi_theta."""
    return ratio(tokens.logprobs, tokens.prox_logprobs.detach(), tokens.mask)


def w_ratio(tokens: PolicyTokens, level: str = "token") -> Tensor:
    """w = pi_prox / mu [N], without gradient.

    level: of the token; of its `sequence`, the product over all tokens; or their `geometric` mean."""
    if level == "token":
        return ratio(tokens.prox_logprobs, tokens.behavior_logprobs, tokens.mask).detach()
    how = {"sequence": "sum", "geometric": "mean"}[level]
    w = sequence_ratio(tokens.prox_logprobs, tokens.behavior_logprobs, tokens, how)
    return w.to(tokens.logprobs.dtype)


def r_ratio(tokens: PolicyTokens) -> Tensor:
    """r = pi_theta / mu [N], with the gradient of pi_theta."""
    return ratio(tokens.logprobs, tokens.behavior_logprobs.detach(), tokens.mask)


def sequence_ratio(logprobs: Tensor, other: Tensor, tokens: PolicyTokens, how: str) -> Tensor:
    """float64[N], without gradient: exp of the `sum` or `mean` of logprobs - other over the unmasked tokens
    of the sequence, at each of them; 1 where masked. Parts and whole are clamped to ± `MAX_LOG_RATIO`."""
    parts = log_ratio(logprobs.detach(), other.detach(), tokens.mask)
    whole = over_sequences(parts, tokens, how).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(tokens.mask, whole, 0.0).exp()


def over_sequences(parts: Tensor, tokens: PolicyTokens, how: str) -> Tensor:
    """float64[N]: the `sum`, `mean` or `max` of parts (float[N], without gradient, 0 where masked) over the
    unmasked tokens of the sequence, at each of its tokens."""
    _, index = torch.unique(tokens.sequences, return_inverse=True)
    zeros = parts.new_zeros(len(parts), dtype=torch.float64)
    if how == "max":
        least = torch.where(tokens.mask, parts.double(), -torch.inf)
        return zeros.scatter_reduce(0, index, least, "amax", include_self=False)[index]
    totals = zeros.index_add(0, index, parts.double())
    if how == "mean":
        totals = totals / zeros.index_add(0, index, tokens.mask.double()).clamp(min=1)
    return totals[index]


def log_ratio_penalty(tokens: PolicyTokens) -> Tensor:
    """(log r)² / 2 [N], with the gradient log r · grad log pi_theta: it pulls back to what sampled.

    Source: as the whole trust region, but of a sequence's log r, Kimi Team 2025 (k1.5, arXiv 2501.12599);
    DRO, Richemond et al. 2024 (arXiv 2405.19107).
    """
    return log_ratio(tokens.logprobs, tokens.behavior_logprobs.detach(), tokens.mask).square() / 2


def score(tokens: PolicyTokens) -> Tensor:
    """float[N]: 1 in value, with the gradient of log pi_theta.

    So -c·A·score has the gradient of the score-function loss -c·A·log pi_theta, and a value on the scale of
    the other objectives' losses.
    """
    logprobs = torch.where(tokens.mask, tokens.logprobs, 0.0)
    return (logprobs - logprobs.detach()).exp()
