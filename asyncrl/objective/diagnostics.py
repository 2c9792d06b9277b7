"""How far the trained policy is from the one that sampled, by token age.

Everything is kept as sums over tokens, so that the parts of a batch (micro-batches, ranks) combine to what
the whole batch would have given. The ratios are w = pi_prox / mu, never clamped, and summed in the log
domain, so that no outlier overflows or hides.

Tokens of age 0 were sampled from the weights that the trainer has: what differs there is the mismatch of
engine and trainer, which is numerical. The drift is what older tokens show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_SUMS = ("tokens", "clipped", "kl", "entropy", "square", "absolute")
_MAXIMA = ("log_w", "absolute")
_LARGEST_EXPONENT = 700.0

SMALLEST_LOG_RATIO = 1e-6
"""Smaller |log w| fall into the histogram's middle bin."""
BINS_PER_DECADE = 16
"""So a quantile of |log w| is known within a factor of 10^(1/32), 7.5%."""
_BINS_PER_SIGN = 8 * BINS_PER_DECADE  # up to |log w| = 100
_BINS = 2 * _BINS_PER_SIGN + 1
QUANTILES = (1, 10, 25, 50, 75, 90, 99)
"""Of w, in percent."""
COLUMNS = len(_SUMS) + 2 + len(_MAXIMA) + _BINS
"""Columns of `Diagnostics.table`: plain sums, the logarithms of Σw and Σw², maxima, histogram of log w."""
_LOGS = slice(len(_SUMS), len(_SUMS) + 2)
_TOPS = slice(_LOGS.stop, _LOGS.stop + len(_MAXIMA))
_HISTOGRAM = slice(_TOPS.stop, COLUMNS)


def token_stats(row: Tensor) -> dict[str, float]:
    """Statistics of the tokens in a row (float64[COLUMNS]) of `Diagnostics`; without tokens, all are 0.

    ess: effective sample size as a share of the tokens, (Σw)² / (N Σw²), in (0, 1]: 1 on policy; 1/N when one
    token outweighs all others. Source: Kong 1992.
    ratio_mean: mean of w: about 1 when mu's log-probabilities are right, whatever the policies.
    ratio_pQ: the least w that at least Q% of the tokens do not exceed, as exactly as the histogram tells.
    kl: KL(mu ‖ pi_prox) in nats a token, by the k3 estimator w - 1 - log w on tokens sampled from mu:
    unbiased and never negative. Source: Schulman 2020, "Approximating KL divergence".
    second_moment: mean of (log w)², which M2PO bounds (`trust_region.m2po_mask`).
    abs_log_ratio, max_abs_log_ratio: of |log w|.
    entropy: mean of the trained policy's next-token distributions, in nats.
    """
    sums = dict(zip(_SUMS, row.tolist(), strict=False))
    tokens = sums["tokens"] or 1.0
    log_sum_w, log_sum_w2 = row[_LOGS].tolist()
    log_most, most = row[_TOPS].tolist()
    stats = {
        "tokens": sums["tokens"],
        "ess": _exp(2 * log_sum_w - log_sum_w2 - math.log(tokens)),
        "ratio_mean": _exp(log_sum_w - math.log(tokens)),
        "ratio_max": _exp(log_most),
        **{f"ratio_p{percent:02}": _ratio_quantile(row, percent / 100) for percent in QUANTILES},
        "second_moment": sums["square"] / tokens,
        "abs_log_ratio": sums["absolute"] / tokens,
        "max_abs_log_ratio": max(0.0, most),
        "kl": sums["kl"] / tokens,
        "clip_frac": sums["clipped"] / tokens,
        "entropy": sums["entropy"] / tokens,
    }
    return stats if sums["tokens"] else dict.fromkeys(stats, 0.0)


def _ratio_quantile(row: Tensor, q: float) -> float:
    reached = row[_HISTOGRAM].cumsum(0) >= q * row[0]
    steps = int(reached.to(torch.uint8).argmax()) - _BINS_PER_SIGN
    if not steps:
        return 1.0
    size = SMALLEST_LOG_RATIO * 10 ** ((abs(steps) - 0.5) / BINS_PER_DECADE)
    return _exp(math.copysign(size, steps))


_OF_ALL = {
    "ess": "ess",
    "ratio/mean": "ratio_mean",
    "ratio/max": "ratio_max",
    **{f"ratio/p{percent:02}": f"ratio_p{percent:02}" for percent in QUANTILES},
    "log_ratio/second_moment": "second_moment",
    "kl/behavior": "kl",
    "clip_frac": "clip_frac",
    "entropy": "entropy",
}
"""The metrics over all tokens, by their names."""
_OF_FRESH: tuple[str, ...] = ("abs_log_ratio", "max_abs_log_ratio", "kl")
_OF_STALE = ("ess", "second_moment", "kl")
_OF_AGE = (
    *("tokens", "ess", "ratio_mean", "ratio_p01", "ratio_p99"),
    *("second_moment", "kl", "clip_frac", "entropy"),
)


class Diagnostics:
    """`token_stats` by token age (staleness: trainer's version minus the version that sampled the token).

    ages: how many there are, 0 among them: `staleness.max_staleness` + 1.
    """

    def __init__(self, ages: int) -> None:
        self._ages = ages
        self._table = _nothing(ages)

    def add(
        self,
        ages: Tensor,
        logprobs: Tensor,
        behavior_logprobs: Tensor,
        clipped: Tensor,
        entropy: Tensor,
        mask: Tensor,
    ) -> None:
        """Count the tokens where `mask` is set. ages: int64[N]; logprobs (of the proximal policy),
        behavior_logprobs and entropy: float[N]; clipped and mask: bool[N]. Computed in float64 on their
        device. Tokens that a diverged policy gives no finite log-probability count nowhere: the update that
        they spoil is skipped, and counted there."""
        mask = mask & logprobs.detach().isfinite() & entropy.detach().isfinite()
        age = ages[mask]
        log_w = logprobs.detach()[mask].double() - behavior_logprobs[mask].double()
        seen = _nothing(self._ages).to(log_w.device)
        if len(log_w):
            sums = [
                torch.ones_like(log_w),
                clipped[mask].double(),
                torch.expm1(log_w.clamp(max=_LARGEST_EXPONENT)) - log_w,
                entropy.detach()[mask].double(),
                log_w.square(),
                log_w.abs(),
            ]
            seen[:, : len(_SUMS)].index_add_(0, age, torch.stack(sums, dim=1))
            for column, values in zip(range(_TOPS.start, _TOPS.stop), (log_w, log_w.abs()), strict=True):
                seen[:, column].scatter_reduce_(0, age, values, "amax")
            top = seen[:, _TOPS.start]
            relative = (log_w - top[age]).exp()
            for power in (1, 2):
                of_age = torch.zeros_like(top).index_add(0, age, relative**power)
                seen[:, _LOGS.start + power - 1] = power * top + of_age.log()
            seen.view(-1).index_add_(0, age * COLUMNS + _HISTOGRAM.start + _bin(log_w), sums[0])
        self._table = _merged(self._table.to(seen.device), seen)

    def to_tensor(self) -> Tensor:
        """float64[ages, COLUMNS]: all that was counted, for `merge` in another process."""
        return self._table.clone()

    def merge(self, table: Tensor) -> None:
        """Count in what another rank has seen, by its `to_tensor`."""
        self._table = _merged(self._table, table.to(self._table.device))

    def metrics(self) -> Iterator[tuple[str, float]]:
        """Names and values for the run's metrics: over all tokens, those of age 0 (`mismatch/`), the older
        ones (`drift/`), and by age (`age/K/`)."""
        table = self._table.cpu()
        total = token_stats(_total(table))
        yield from ((name, total[statistic]) for name, statistic in _OF_ALL.items())
        parts = [("mismatch", table[0], _OF_FRESH), ("drift", _total(table[1:]), _OF_STALE)]
        parts += [(f"age/{age}", row, _OF_AGE) for age, row in enumerate(table)]
        for prefix, row, statistics in parts:
            if row[0]:
                stats = token_stats(row)
                yield from ((f"{prefix}/{name}", stats[name]) for name in statistics)


def _nothing(ages: int) -> Tensor:
    """The table of no tokens at all."""
    table = torch.zeros(ages, COLUMNS, dtype=torch.float64)
    table[:, _LOGS.start : _TOPS.stop] = -math.inf
    return table


def _merged(a: Tensor, b: Tensor) -> Tensor:
    merged = a + b
    merged[..., _LOGS] = torch.logaddexp(a[..., _LOGS], b[..., _LOGS])
    merged[..., _TOPS] = torch.maximum(a[..., _TOPS], b[..., _TOPS])
    return merged


def _total(table: Tensor) -> Tensor:
    """One row for all."""
    total = _nothing(1)[0]
    for row in table:
        total = _merged(total, row)
    return total


def _bin(log_w: Tensor) -> Tensor:
    """int64[N]: the histogram's bin of each log-ratio; evenly many to a decade of |log w|, in both signs."""
    decades = (log_w.abs() / SMALLEST_LOG_RATIO).log10()
    steps = (decades * BINS_PER_DECADE).floor().clamp(-1, _BINS_PER_SIGN - 1).long() + 1
    return _BINS_PER_SIGN + torch.where(log_w < 0, -steps, steps)


def _exp(x: float) -> float:
    """e^x, bounded so that a metric stays a finite number."""
    return math.exp(min(x, _LARGEST_EXPONENT))
