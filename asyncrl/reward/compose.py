"""Composes a reward from its parts: pure arithmetic.

The value x of a part is transformed in this order, by the steps that the config asks for:

    sigmoid       1 / (1 + exp(-x))        a reward model's score as a probability: Bradley and Terry 1952
    standardise   (x - mean) / std         over the batches so far or each group (`asyncrl.reward.statistics`)
    cap           min(x - cap, 0)          Clip of Gao et al. 2024, arXiv 2410.15115, section 5
    clip          min(max(x, low), high)
    gate          x if the gating part is above 0, else 0: Posterior-GRPO, arXiv 2508.05170
    weight        w x

The reward is the sum.

Gao et al. also propose Delta, for models that score every step of a response: step k earns r_k - r_{k+1}, so
that the steps from k on sum to r_k and mere repetition earns nothing. The scores here are of whole responses,
earned once whatever the length, so Delta would change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncrl.config import RewardConfig, RewardModelConfig
from asyncrl.config.reward import PartConfig

if TYPE_CHECKING:
    from asyncrl.core.records import Trajectory  # with numpy, which reward processes do without


@dataclass(frozen=True, slots=True)
class PartRule:
    """How one part enters the reward."""

    name: str
    weight: float = 1.0
    sigmoid: bool = False
    standardise: bool | str = False
    cap: float | None = None
    clip: tuple[float, float] | None = None
    gate: str | None = None
    shaping: bool = False
    """Only shapes a reward that other parts give."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Mean and standard deviation of a part."""

    mean: float
    std: float


OVERLONG, FORMAT = "overlong", "format"


def part_rules(config: RewardConfig) -> tuple[PartRule, ...]:
    """The rules of all parts, in the order of the sum."""
    shaping = {OVERLONG: config.overlong.weight, FORMAT: config.format.weight}
    rules = [_rule(part.label, part) for part in config.scoring.values()]
    names = config.part_names[len(rules) :]
    return (
        *rules,
        *(PartRule(name, shaping[name], shaping=True) for name in names),
        *(_rule(name, part) for name, part in config.episode.items()),
    )


def _rule(name: str, part: PartConfig) -> PartRule:
    sigmoid = isinstance(part, RewardModelConfig) and part.sigmoid
    return PartRule(name, part.weight, sigmoid, part.standardise, part.cap, part.clip, part.gate)


def compose(
    values: Mapping[str, float], rules: Sequence[PartRule], scales: Mapping[str, Scale] | None = None
) -> float:
    """The reward of a response. `values` has the raw scores of the parts that apply to it.

    What no rule names is an episode's own, and enters as it is.

    scales: for the parts that are standardised. Without it these enter unchanged, and neither their `cap` nor
        their `clip`, which are for standardised values, is applied.

    Raises `ValueError` if of several that score none applies, or if the sum is not finite.
    """
    applied = _applied(values, rules)
    if all(rule.shaping for rule in applied) and not all(rule.shaping for rule in rules):
        raise ValueError("no reward function or model applies to it; at least one must score it")
    reward = sum(rule.weight * _term(values, rule, scales) for rule in applied)
    if not math.isfinite(reward):
        raise ValueError(f"the weighted sum is {reward}; its parts are {dict(values)}")
    return reward


def turn_rewards(
    trajectory: Trajectory, rules: Sequence[PartRule], scales: Mapping[str, Scale] | None = None
) -> tuple[tuple[int, float], ...]:
    """What of the reward of `compose` each turn has earned, at its last token; empty where it was not earned
    by turns.

    A part's turns keep their proportions: weight, gate and the deviation of what is standardised are factors.
    The rest (the mean, `cap`, `clip`, parts that were given in all) comes at the last turn.
    """
    values, of_turns = trajectory.reward_parts, trajectory.turn_parts
    if not of_turns:
        return trajectory.turn_rewards
    factors = {r.name: r.weight * _slope(values, r, scales) for r in _applied(of_turns, rules)}
    shares = [
        sum(factor * of_turns[name][k] for name, factor in factors.items())
        for k in range(len(trajectory.turns))
    ]
    shares[-1] += compose(values, rules, scales) - sum(f * values[name] for name, f in factors.items())
    return tuple((at, share) for (_, at), share in zip(trajectory.turns, shares, strict=True))


def _applied(values: Collection[str], rules: Sequence[PartRule]) -> list[PartRule]:
    """The rule of each of the values."""
    known = {rule.name for rule in rules}
    return [
        *(rule for rule in rules if rule.name in values),
        *(PartRule(name) for name in values if name not in known),
    ]


def _slope(values: Mapping[str, float], rule: PartRule, scales: Mapping[str, Scale] | None) -> float:
    """How fast a part's term grows with its value, its cap and clip apart."""
    if rule.gate is not None and values.get(rule.gate, 1.0) <= 0:
        return 0.0
    return 1.0 if scales is None or not rule.standardise else 1 / scales[rule.name].std


def _term(values: Mapping[str, float], rule: PartRule, scales: Mapping[str, Scale] | None) -> float:
    """A part's term of the sum, before its weight."""
    if rule.gate is not None and values.get(rule.gate, 1.0) <= 0:
        return 0.0
    x = squashed(values[rule.name], rule)
    if rule.standardise:
        if scales is None:
            return x
        x = (x - scales[rule.name].mean) / scales[rule.name].std
    if rule.cap is not None:
        x = min(x - rule.cap, 0.0)
    if rule.clip is not None:
        x = min(max(x, rule.clip[0]), rule.clip[1])
    return x


def squashed(value: float, rule: PartRule) -> float:
    """A part's score after the optional sigmoid, before it is standardised."""
    if not rule.sigmoid:
        return value
    return 1 / (1 + math.exp(-value)) if value >= 0 else (e := math.exp(value)) / (1 + e)
