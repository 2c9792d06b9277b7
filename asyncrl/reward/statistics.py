"""Means and standard deviations of the parts that are standardised, running ones or of each group.

They live in the trainer, next to the optimizer, and are updated once per training step from the parts that
every trajectory carries. Workers come, go and restart: kept there, the statistics would differ from worker to
worker. The trainer treats all groups of a batch alike, in a fixed order, and saves the state with the model
that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from asyncrl.config import RewardConfig
from asyncrl.core.records import Batch, Trajectory
from asyncrl.reward.compose import PartRule, Scale, compose, part_rules, squashed, turn_rewards

EPS = 1e-6
"""Added to standard deviations, so that a part without variance becomes 0."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Weighted mean and variance, merged batch by batch (Chan et al. 1979)."""

    weight: float = 0.0
    mean: float = 0.0
    m2: float = 0.0
    """Weighted sum of squared deviations from the mean."""

    @staticmethod
    def of(values: Sequence[float]) -> Moments:
        """Each value with the weight 1."""
        if not values:
            return Moments()
        array = np.asarray(values, dtype=np.float64)
        return Moments(float(len(array)), float(array.mean()), float(array.var() * len(array)))

    def decayed(self, decay: float) -> Moments:
        """The same mean and variance with less weight relative to later samples."""
        return Moments(self.weight * decay, self.mean, self.m2 * decay)

    def merged(self, other: Moments) -> Moments:
        """The moments of both samples together."""
        weight = self.weight + other.weight
        if weight == 0:
            return self
        shift = other.mean - self.mean
        return Moments(
            weight,
            self.mean + shift * other.weight / weight,
            self.m2 + other.m2 + shift * shift * self.weight * other.weight / weight,
        )

    @property
    def std(self) -> float:
        """Population standard deviation."""
        return math.sqrt(self.m2 / self.weight) if self.weight else 0.0


class RewardScaler:
    """Recomposes the rewards of each batch with the statistics up to and including that batch, or of the
    group. Does nothing if no part is standardised."""

    def __init__(self, config: RewardConfig) -> None:
        self._rules = part_rules(config)
        self._decay = config.standardise_decay
        self._within_groups = [rule for rule in self._rules if rule.standardise == "group"]
        self._moments = {rule.name: Moments() for rule in self._rules if rule.standardise is True}

    def __call__(self, batch: Batch) -> dict[str, float]:
        """Update the statistics, and every trajectory's `reward` in place. Returns the statistics as
        metrics."""
        if not self._moments and not self._within_groups:
            return {}
        # Sorted, because sums of floats depend on the order.
        groups = sorted(batch.groups, key=lambda group: group.group_id)
        running = [rule for rule in self._rules if rule.standardise is True]
        firsts = [[t for t in group.trajectories if t.segment == 0] for group in groups]
        for name, moments in _moments(running, [t for group in firsts for t in group]).items():
            self._moments[name] = self._moments[name].decayed(self._decay).merged(moments)
        for group, members in zip(groups, firsts, strict=True):
            seen = self._moments | _moments(self._within_groups, members)
            scales = {name: Scale(m.mean, m.std + EPS) for name, m in seen.items()}
            for trajectory in group.trajectories:
                trajectory.reward = compose(trajectory.reward_parts, self._rules, scales)
                trajectory.turn_rewards = turn_rewards(trajectory, self._rules, scales)
        return {
            f"reward/{name}/running_{what}": value
            for name, m in self._moments.items()
            for what, value in (("mean", m.mean), ("std", m.std))
        }

    def state(self) -> dict[str, dict[str, float]]:
        """The statistics of each part, for a checkpoint."""
        return {name: asdict(moments) for name, moments in self._moments.items()}

    def load(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Continue from what `state` returned. Parts that were not standardised before start from nothing."""
        self._moments |= {name: Moments(**state[name]) for name in self._moments if name in state}


def _moments(rules: Iterable[PartRule], trajectories: Sequence[Trajectory]) -> dict[str, Moments]:
    """Of each part's scores, after the optional sigmoid, where it gave any."""
    return {
        rule.name: Moments.of(
            [squashed(t.reward_parts[rule.name], rule) for t in trajectories if rule.name in t.reward_parts]
        )
        for rule in rules
    }
