"""From the parts of a reward to the reward: pure arithmetic on numbers.

A part's value x becomes, in this order and each only where it is asked for,

    sigmoid       1 / (1 + exp(-x))        a reward model's score as a chance: Bradley and Terry 1952
    standardise   (x - mean) / std         over the batches so far (`asyncrl.reward.statistics`)
    cap           min(x - cap, 0)          Clip of Gao et al. 2024, arXiv 2410.15115, section 5
    clip          min(max(x, low), high)
    gate          x where the gating rule gave more than 0, else 0: Posterior-GRPO, arXiv 2508.05170
    weight        w x

and the reward is the sum.

The paper has a second refinement beside Clip, Delta, for models that score every step of a response: step k
earns r_k - r_{k+1}, so that what follows from step k on sums to r_k and steps that only repeat earn nothing.
A score of the whole response, which is all that there is here, is one step: it is earned once, whatever the
length, which is what Delta is for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asyncrl.config import RewardConfig, RewardModelConfig


@dataclass(frozen=True, slots=True)
class PartRule:
    """What becomes of one part."""

    name: str
    weight: float = 1.0
    sigmoid: bool = False
    standardise: bool = False
    cap: float | None = None
    clip: tuple[float, float] | None = None
    gate: str | None = None
    shaping: bool = False
    """Shapes a reward, and is none by itself."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Mean and standard deviation of a part."""

    mean: float
    std: float


OVERLONG, FORMAT = "overlong", "format"


def part_rules(config: RewardConfig) -> tuple[PartRule, ...]:
    """The rules of all parts, in the order of the sum."""
    shaping = {OVERLONG: config.overlong.weight, FORMAT: config.format.weight}
    rules = [
        PartRule(
            part.label,
            part.weight,
            isinstance(part, RewardModelConfig) and part.sigmoid,
            part.standardise,
            part.cap,
            part.clip,
            part.gate,
        )
        for part in (*config.functions, *config.models)
    ]
    names = config.part_names[len(rules) :]
    return (*rules, *(PartRule(name, shaping[name], shaping=True) for name in names))


def compose(
    values: Mapping[str, float], rules: Sequence[PartRule], scales: Mapping[str, Scale] | None = None
) -> float:
    """The reward of a response, of which `values` has the parts that apply to it, as they were scored.

    scales: of the parts that are standardised. Without it those enter as they are, with neither `cap` nor
        `clip`, which are meant for what is standardised.

    Raises `ValueError` where nothing but shaping applies, or where the sum is not finite.
    """
    if not any(rule.name in values for rule in rules if not rule.shaping):
        raise ValueError("no function or model applies to it; one has to give it a number")
    reward = sum(rule.weight * _term(values, rule, scales) for rule in rules if rule.name in values)
    if not math.isfinite(reward):
        raise ValueError(f"the weighted sum is {reward}; its parts are {dict(values)}")
    return reward


def _term(values: Mapping[str, float], rule: PartRule, scales: Mapping[str, Scale] | None) -> float:
    """A part's share of the sum, before its weight."""
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
    """What of a part's score is standardised."""
    if not rule.sigmoid:
        return value
    return 1 / (1 + math.exp(-value)) if value >= 0 else (e := math.exp(value)) / (1 + e)
