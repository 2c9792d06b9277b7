"""How far the trained policy is from the one that sampled, over all tokens and by token age.

Everything is kept as sums over tokens, so that the parts of a batch (micro-batches, ranks) combine to what
the whole batch would have given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

_LARGEST_EXPONENT = 700.0


@dataclass(frozen=True, slots=True)
class TokenStats:
    """Sums over a set of tokens, of the raw importance ratios w = pi_theta / mu among others.

    The ratios are never clamped, and summed in the log domain, so that no outlier overflows or hides.
    """

    tokens: int = 0
    log_sum_w: float = -math.inf
    log_sum_w2: float = -math.inf
    max_log_w: float = -math.inf
    sum_kl: float = 0.0
    clipped: int = 0
    sum_entropy: float = 0.0

    def __add__(self, other: TokenStats) -> TokenStats:
        return TokenStats(
            self.tokens + other.tokens,
            _log_add(self.log_sum_w, other.log_sum_w),
            _log_add(self.log_sum_w2, other.log_sum_w2),
            max(self.max_log_w, other.max_log_w),
            self.sum_kl + other.sum_kl,
            self.clipped + other.clipped,
            self.sum_entropy + other.sum_entropy,
        )

    @property
    def ess(self) -> float:
        """Effective sample size as a share of the tokens: (Σw)² / (N Σw²), in (0, 1]; 0 without tokens.

        Source: Kong 1992. 1 on policy; 1/N when one token outweighs all others.
        """
        if not self.tokens:
            return 0.0
        return math.exp(2 * self.log_sum_w - self.log_sum_w2 - math.log(self.tokens))

    @property
    def ratio_mean(self) -> float:
        """Mean of w: about 1 when mu's log-probabilities are right, whatever the policies."""
        return _exp(self.log_sum_w - math.log(self.tokens)) if self.tokens else 0.0

    @property
    def ratio_max(self) -> float:
        return _exp(self.max_log_w) if self.tokens else 0.0

    @property
    def kl(self) -> float:
        """KL(mu ‖ pi_theta) in nats a token, by the k3 estimator w - 1 - log w on tokens sampled from mu:
        unbiased and never negative. Source: Schulman 2020, "Approximating KL divergence"."""
        return self.sum_kl / self.tokens if self.tokens else 0.0

    @property
    def clip_frac(self) -> float:
        return self.clipped / self.tokens if self.tokens else 0.0

    @property
    def entropy(self) -> float:
        """Mean entropy of the trained policy's next-token distribution, in nats."""
        return self.sum_entropy / self.tokens if self.tokens else 0.0


def token_stats(logprobs: Tensor, behavior_logprobs: Tensor, clipped: Tensor, entropy: Tensor) -> TokenStats:
    """The sums over N tokens: float[N] each, `clipped` bool[N]. Computed in float64, on the tensors'
    device."""
    if not len(logprobs):
        return TokenStats()
    log_w = logprobs.detach().double() - behavior_logprobs.double()
    sums = torch.stack(
        [
            log_w.logsumexp(0),
            (2 * log_w).logsumexp(0),
            log_w.max(),
            (torch.expm1(log_w.clamp(max=_LARGEST_EXPONENT)) - log_w).sum(),
            clipped.double().sum(),
            entropy.detach().double().sum(),
        ]
    ).tolist()
    log_sum_w, log_sum_w2, max_log_w, sum_kl, clipped_tokens, sum_entropy = sums
    return TokenStats(
        len(logprobs), log_sum_w, log_sum_w2, max_log_w, sum_kl, int(clipped_tokens), sum_entropy
    )


@dataclass(slots=True)
class Diagnostics:
    """`TokenStats` by token age (staleness: trainer's version minus the version that sampled the token)."""

    by_age: dict[int, TokenStats] = field(default_factory=dict)

    def add(
        self,
        ages: Tensor,
        logprobs: Tensor,
        behavior_logprobs: Tensor,
        clipped: Tensor,
        entropy: Tensor,
        mask: Tensor,
    ) -> None:
        """Count the tokens where `mask` (bool[N]) is set. ages: int[N]; the rest as for `token_stats`."""
        for age in torch.unique(ages[mask]).tolist():
            here = mask & (ages == age)
            stats = token_stats(logprobs[here], behavior_logprobs[here], clipped[here], entropy[here])
            self.by_age[age] = self.by_age.get(age, TokenStats()) + stats

    def merge(self, other: Diagnostics) -> None:
        """Count in what another micro-batch or rank has seen."""
        for age, stats in other.by_age.items():
            self.by_age[age] = self.by_age.get(age, TokenStats()) + stats

    @property
    def total(self) -> TokenStats:
        return sum((self.by_age[age] for age in sorted(self.by_age)), TokenStats())

    def metrics(self) -> Iterator[tuple[str, float]]:
        """Names and values for the run's metrics, over all tokens and as `age/K/...`."""
        total = self.total
        yield "ess", total.ess
        yield "ratio/mean", total.ratio_mean
        yield "ratio/max", total.ratio_max
        yield "kl/behavior", total.kl
        yield "clip_frac", total.clip_frac
        yield "entropy", total.entropy
        for age, stats in sorted(self.by_age.items()):
            yield f"age/{age}/tokens", float(stats.tokens)
            yield f"age/{age}/ratio_mean", stats.ratio_mean
            yield f"age/{age}/kl", stats.kl
            yield f"age/{age}/clip_frac", stats.clip_frac
            yield f"age/{age}/entropy", stats.entropy


def _log_add(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _exp(x: float) -> float:
    """e^x, bounded so that a metric stays a finite number."""
    return math.exp(min(x, _LARGEST_EXPONENT))
