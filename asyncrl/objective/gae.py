"""Advantages of tokens and targets for the critic, from the critic's values.

Everything runs over the sampled tokens only: what comes between two of them (a tool's output) is part of the
environment, and the token after it is the next step. A sequence's reward is given at its last sampled token,
and there is none after it. Where a sequence was cut off, gamma·V at its end in the place of its reward stands
for what would have followed (partial-episode bootstrapping: Pardo et al. 2018, arXiv 1712.00378).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Steps:
    """What a critic's advantages are made of. Flat arrays of T tokens; a sequence's tokens are contiguous and
    in order.

    values: float[T], V of the state before each token; read where `mask` is set.
    rewards: float[S], of each sequence.
    sequences: int64[T], the index of each token's sequence in `rewards`.
    mask: bool[T], the sampled tokens.
    token_rewards: float[T], further rewards at tokens (such as a KL penalty); None for none.
    """

    values: Tensor
    rewards: Tensor
    sequences: Tensor
    mask: Tensor
    token_rewards: Tensor | None = None


def gae(steps: Steps, *, gamma: float = 1.0, lam: float = 1.0) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: (advantages, value targets), float[T] each, 0 where not sampled.

        delta_t = R_t + gamma·V_{t+1} - V_t
        A_t = delta_t + gamma·lam·A_{t+1},   target_t = V_t + A_t

    R_t is the reward at t.

    Source: Schulman et al. 2016 (arXiv 1506.02438).
    """
    return vtrace(steps, torch.ones_like(steps.values), gamma=gamma, lam=lam)


def vtrace(
    steps: Steps,
    ratios: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """GAE that corrects for stale tokens: (advantages, value targets), float[T] each, 0 where not sampled.

        rho_t = min(rho_bar, r_t),   c_t = lam·min(c_bar, r_t)
        delta_t = R_t + gamma·V_{t+1} - V_t
        v_t = V_t + rho_t·delta_t + gamma·c_t·(v_{t+1} - V_{t+1})
        A_t = delta_t + gamma·lam·(v_{t+1} - V_{t+1})

    v_t is the target, R_t the reward at t, and r_t = pi/mu (`ratios`, float[T]) the ratio of the token. A_t
    holds the ratios of what followed, and not that of the token itself: that one is the policy loss's to
    apply. With lam = 1 this is V-trace's advantage R_t + gamma·v_{t+1} - V_t; with every ratio 1 (and
    `rho_bar`, `c_bar` at least 1) it is `gae`, exactly.

    Source: Espeholt et al. 2018 (IMPALA, arXiv 1802.01561).
    """
    at = steps.mask.nonzero()[:, 0]
    values, sequences, ratio = steps.values[at].double(), steps.sequences[at], ratios[at].double()
    ends = torch.ones_like(sequences, dtype=torch.bool)
    ends[:-1] = sequences[1:] != sequences[:-1]
    rewards = torch.where(ends, steps.rewards.double()[sequences], 0.0)
    if steps.token_rewards is not None:
        rewards = rewards + steps.token_rewards[at].double()
    delta = rewards + gamma * _next(values, ends) - values
    trace = torch.where(ends, 0.0, gamma * lam * ratio.clamp(max=c_bar))
    excess = _discounted(ratio.clamp(max=rho_bar) * delta, trace)
    advantages = delta + gamma * lam * _next(excess, ends)
    return _spread(advantages, at, steps.values), _spread(values + excess, at, steps.values)


def whiten(advantages: Tensor, mask: Tensor) -> Tensor:
    """float[T]: the advantages less their mean, over their deviation, of the tokens where `mask` (bool[T]) is
    set; 0 elsewhere. Constant advantages become 0."""
    counted = advantages[mask].double()
    if not len(counted):
        return torch.zeros_like(advantages)
    mean, std = counted.mean(), counted.std(correction=0)
    noise = 1e-6 * mean.abs().clamp(min=1)
    scaled = torch.where(std > noise, (advantages - mean) / std.clamp(min=noise), 0.0)
    return torch.where(mask, scaled, 0.0).to(advantages.dtype)


def _next(values: Tensor, ends: Tensor) -> Tensor:
    """The value at the next step of the same sequence; 0 at its last."""
    return torch.where(ends, 0.0, values.roll(-1))


def _discounted(x: Tensor, decay: Tensor) -> Tensor:
    """y with y_t = x_t + decay_t·y_{t+1}, for decay 0 at the end of each sequence.

    By doubling: after k rounds y_t reaches 2^k steps ahead, so the number of rounds is the logarithm of the
    longest sequence, whatever the number of tokens.
    """
    step = 1
    while step < len(x) and decay.any():
        x, decay = x.clone(), decay.clone()
        x[:-step] += decay[:-step] * x[step:]
        decay[:-step] *= decay[step:].clone()
        step *= 2
    return x


def _spread(values: Tensor, at: Tensor, like: Tensor) -> Tensor:
    """The values at their places in the shape and dtype of `like`, 0 elsewhere."""
    out = torch.zeros_like(like)
    out[at] = values.to(like.dtype)
    return out
