"""The critic's part of a training step: values of a batch, and updates toward their targets."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from asyncrl.config import CriticConfig
from asyncrl.objective.normalise import token_mean
from asyncrl.trainer.critic.loss import NO_VALUES, HlGauss, ValueStats, ValueTerms, value_loss, value_stats
from asyncrl.trainer.learner import Learner, Update
from asyncrl.trainer.packing.mini_batch import MiniBatch, count_micros, over_tokens
from asyncrl.trainer.ranks import Ranks
from asyncrl.work import did_one, working


class CriticUpdate:
    """Values are always those of the critic as it is when a batch is consumed, never of when it was sampled:
    how stale a batch is makes no difference to them."""

    def __init__(self, critic: Learner, ranks: Ranks, config: CriticConfig) -> None:
        self._critic = critic
        self._ranks = ranks
        self._config = config
        self._classes = None if config.bins is None else HlGauss(config.bins, *config.value_range)

    def values(self, minis: Sequence[MiniBatch], tokens: int) -> Tensor:
        """float32[T]: V before each trained token of the batch, 0 elsewhere."""
        return over_tokens(minis, tokens, self._ranks, lambda micro: self._value(self._critic(micro)))

    def train(
        self, minis: Sequence[MiniBatch], old_values: Tensor, targets: Tensor, lr: float, step: int
    ) -> dict[str, float]:
        """Update the critic toward `targets` (float[T]) from where it gave `old_values` (float[T]); metrics.
        The explained variance is that of the old values, before the critic has seen the batch."""
        before, seen = NO_VALUES, NO_VALUES
        updates: list[Update] = []
        passes = [(epoch, mini) for epoch in range(self._config.updates_per_policy_step) for mini in minis]
        with working("micro-batches of the critic's updates", count_micros([mini for _, mini in passes])):
            for epoch, mini in passes:
                for micro in mini.micros():
                    at = micro.token_index
                    outputs = self._critic(micro)
                    everything = torch.ones_like(at, dtype=torch.bool)
                    terms = self._loss(outputs, old_values[at], targets[at], everything)
                    self._critic.backward(token_mean(terms.loss, everything, mini.totals.tokens))
                    seen += value_stats(self._value(outputs), targets[at], terms.clipped, everything)
                    if epoch == 0:
                        unclipped = torch.zeros_like(everything)
                        before += value_stats(old_values[at], targets[at], unclipped, everything)
                    did_one()
                updates.append(self._critic.update(lr, step))
        before, seen = (ValueStats(self._ranks.sum_on_host(stats.sums.clone())) for stats in (before, seen))
        return {
            "critic/loss": seen.loss,
            "critic/explained_variance": before.explained_variance,
            "critic/clip_frac": seen.clip_frac,
            "critic/grad_norm": sum(u.grad_norm for u in updates) / len(updates),
            "critic/skipped_updates": float(sum(not u.applied for u in updates)),
            "critic/lr": lr,
        }

    def _value(self, outputs: Tensor) -> Tensor:
        """float32[N]: V of what the critic puts out."""
        return outputs if self._classes is None else self._classes.value(outputs)

    def _loss(self, outputs: Tensor, old_values: Tensor, targets: Tensor, mask: Tensor) -> ValueTerms:
        if self._classes is not None:
            return ValueTerms(self._classes.loss(outputs, targets), ~mask)
        value_clip = math.inf if self._config.value_clip is None else self._config.value_clip
        return value_loss(outputs, old_values, targets, mask, value_clip=value_clip)
