"""The critic's loss, by regression or by classification, and how much of the returns it explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


class ValueTerms(NamedTuple):
    """loss: float[N], 0 where masked. clipped: bool[N], the tokens whose gradient the clip cut to 0."""

    loss: Tensor
    clipped: Tensor


def value_loss(
    values: Tensor, old_values: Tensor, targets: Tensor, mask: Tensor, *, value_clip: float = 0.5
) -> ValueTerms:
    """Squared error of the critic, clipped as PPO's implementations clip it. All arguments are [N].

        bounded = old + clip(V - old, -value_clip, value_clip)
        loss = max((V - target)², (bounded - target)²) / 2

    So a value gains nothing from moving further than `value_clip` from what it was (`old_values`) when the
    targets were computed; infinity turns that off. Where masked, the arguments may be anything.

    Source: Dhariwal et al. 2017 (OpenAI Baselines); whether it helps: Engstrom et al. 2020
    (arXiv 2005.12729).
    """
    values = torch.where(mask, values, 0.0)
    old, targets = (torch.where(mask, x.detach(), 0.0) for x in (old_values, targets))
    bounded = old + (values - old).clamp(-value_clip, value_clip)
    error, bounded_error = (values - targets).square(), (bounded - targets).square()
    clipped = ((values - old).abs() > value_clip) & (bounded_error > error)
    return ValueTerms(torch.where(clipped, bounded_error, error) / 2, clipped)


@dataclass(frozen=True, slots=True)
class HlGauss:
    """A value as the mean of a distribution over `bins` bins of equal width from `low` to `high`, trained by
    cross-entropy: gradients are bounded, whatever the scale of the returns, and an outlier moves a value no
    further than others do.

        p_i = (F(right edge of i) - F(left edge of i)) / (F(high) - F(low)),   F that of N(target, sigma²)
        loss = - sum of p_i·log q_i,   V = sum of q_i·(middle of i),   sigma = 3/4 of a bin

    Targets beyond low and high are taken for these.

    Source: Imani and White 2018 (arXiv 1806.04613); of critics, Farebrother et al. 2024, "Stop regressing"
    (arXiv 2403.03950), where sigma is from.
    """

    bins: int
    low: float
    high: float

    def edges(self, like: Tensor) -> Tensor:
        return torch.linspace(self.low, self.high, self.bins + 1, dtype=torch.float64).to(like.device)

    def value(self, logits: Tensor) -> Tensor:
        """float[N] from logits float[N, bins]."""
        edges = self.edges(logits)
        return logits.softmax(-1) @ ((edges[1:] + edges[:-1]) / 2).to(logits.dtype)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """float[N] from logits float[N, bins] and targets float[N]."""
        sigma = 0.75 * (self.high - self.low) / self.bins
        aims = targets.detach().double().clamp(self.low, self.high)[:, None]
        below = torch.special.ndtr((self.edges(logits) - aims) / sigma)
        p = below.diff(dim=-1) / (below[:, -1:] - below[:, :1])
        return cross_entropy(logits, p.to(logits.dtype), reduction="none")


@dataclass(frozen=True, slots=True)
class ValueStats:
    """Of tokens, as sums: those of the parts of a batch add up to those of the whole."""

    sums: Tensor
    """float64[6] in host memory: tokens, targets, their squares, errors (target - V), their squares, clipped
    tokens."""

    def __add__(self, other: ValueStats) -> ValueStats:
        return ValueStats(self.sums + other.sums)

    @property
    def explained_variance(self) -> float:
        """1 - Var(target - V) / Var(target): 1 for a perfect critic, 0 for a constant one; 0 when the targets
        are all equal."""
        tokens, target, target2, error, error2, _ = self.sums.tolist()
        if not tokens:
            return 0.0
        variance = target2 / tokens - (target / tokens) ** 2
        unexplained = error2 / tokens - (error / tokens) ** 2
        return 1 - unexplained / variance if variance > 1e-12 * max(1.0, (target / tokens) ** 2) else 0.0

    @property
    def loss(self) -> float:
        """Mean of (V - target)² / 2, without the clip."""
        return float(self.sums[4] / self.sums[0].clamp(min=1)) / 2

    @property
    def clip_frac(self) -> float:
        return float(self.sums[5] / self.sums[0].clamp(min=1))


NO_VALUES = ValueStats(torch.zeros(6, dtype=torch.float64))


def value_stats(values: Tensor, targets: Tensor, clipped: Tensor, mask: Tensor) -> ValueStats:
    """Of the tokens where `mask` (bool[N]) is set. values, targets: float[N]; clipped: bool[N]."""
    target = targets.detach()[mask].double()
    error = target - values.detach()[mask].double()
    sums = (mask.sum(), target.sum(), target.square().sum(), error.sum(), error.square().sum())
    return ValueStats(torch.stack([*sums, (clipped & mask).sum()]).double().cpu())
