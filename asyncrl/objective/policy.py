"""Policy objectives, by name.

An objective is a function of `PolicyTokens` whose settings are keyword-only and named as the keys of the
config's section `objective`. It returns the loss of each token; `asyncrl.objective.normalise` makes one
number of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to ± this before `exp` (e^20 is about 5e8), so that no pair of finite
log-probabilities gives an infinite loss or gradient. Beyond it the gradient through the ratio is 0."""


@dataclass(frozen=True, slots=True)
class PolicyTokens:
    """What a policy objective sees: float[N] each, but `mask` (bool[N]).

    logprobs: of the sampled tokens under the policy being trained (carries the gradient).
    prox_logprobs: under the policy at the start of the training step, the centre of the clip.
    behavior_logprobs: under the distribution that sampled them.
    advantages: of each token.
    mask: which tokens count; elsewhere the other values may be anything (NaN and infinities too).
    """

    logprobs: Tensor
    prox_logprobs: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    mask: Tensor


class PolicyTerms(NamedTuple):
    """loss: float[N], 0 where masked. clipped: bool[N], the tokens whose gradient the clip cut to 0."""

    loss: Tensor
    clipped: Tensor


PolicyLoss = Callable[[PolicyTokens], PolicyTerms]
_REGISTRY: dict[str, Callable[..., PolicyTerms]] = {}


def register(name: str) -> Callable[[Callable[..., PolicyTerms]], Callable[..., PolicyTerms]]:
    """Make an objective available as `objective.policy_loss: NAME`."""

    def add(function: Callable[..., PolicyTerms]) -> Callable[..., PolicyTerms]:
        if name in _REGISTRY:
            raise ValueError(f"a policy objective named {name!r} is registered already")
        _REGISTRY[name] = function
        return function

    return add


def make_policy_loss(name: str, settings: Mapping[str, object]) -> PolicyLoss:
    """The objective `name`, with the settings that it declares taken from `settings` (others are left alone).

    Raises `ValueError` for a name that is not registered, `KeyError` for a setting that is not there.
    """
    if name not in _REGISTRY:
        raise ValueError(f"no policy objective is named {name!r}; there are: {', '.join(sorted(_REGISTRY))}")
    function = _REGISTRY[name]
    parameters = inspect.signature(function).parameters.values()
    declared = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return partial(function, **{key: settings[key] for key in declared})


def ratio(logprobs: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """exp(logprobs - other) [N], with the log-ratio clamped to ± `MAX_LOG_RATIO`; 1, without gradient, where
    masked."""
    return torch.where(mask, logprobs - other, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


@register("decoupled_ppo")
def decoupled_ppo(
    tokens: PolicyTokens, *, clip_eps_low: float, clip_eps_high: float, behavior_cap: float | None
) -> PolicyTerms:
    """Decoupled PPO: the clip is centred on the proximal policy, the sampling corrected to the behaviour
    policy.

        loss = -sg(min(w, behavior_cap)) · min(u·A, clip(u, 1 - clip_eps_low, 1 + clip_eps_high)·A)
        w = pi_prox / mu,   u = pi_theta / pi_prox

    `sg` stops the gradient. The correction w is always applied; `behavior_cap` truncates it, None leaves it
    whole.

    Source: Hilton, Cobbe, Schulman 2022 (arXiv 2110.00641), and Fu et al. 2025 (AReaL, arXiv 2505.24298);
    separate clip bounds: Yu et al. 2025 (DAPO, arXiv 2503.14476).
    """
    mask = tokens.mask
    advantages = torch.where(mask, tokens.advantages, 0.0)
    correction = ratio(tokens.prox_logprobs, tokens.behavior_logprobs, mask).detach()
    if behavior_cap is not None:
        correction = correction.clamp(max=behavior_cap)
    u = ratio(tokens.logprobs, tokens.prox_logprobs.detach(), mask)
    bounded = u.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    clipped = bounded * advantages < u * advantages
    surrogate = torch.where(clipped, bounded, u) * advantages
    return PolicyTerms(-correction * surrogate, clipped)
