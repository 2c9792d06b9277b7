"""Which objectives, advantages and so on there are, by the names that the config gives them.

Only names: this imports no torch, so that a config is judged without it. The functions' docstrings have the
formulas and the sources; `docs/objectives.md` shows them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_HERE = "asyncrl.objective"


@dataclass(frozen=True, slots=True)
class Entry:
    """A function of this package that a config can name."""

    function: str
    """Where it is, `module:function`."""
    settings: tuple[str, ...] = ()
    """Its keyword-only settings, of the section `objective`; their defaults are in its signature."""
    aggregation: str = "token_mean"
    """Policy losses: how the tokens' losses become one number, unless the config says otherwise."""
    has_proximal: bool = True
    """Policy losses: whether they have a proximal policy (`PolicyTokens.prox_logprobs`)."""
    batch_mask: str | None = None
    """Policy losses: the function that decides over a whole mini-batch which tokens are kept,
    `module:function`. Its settings are among `settings`."""
    needs_ratios: bool = False
    """Advantages: whether they ask for pi_prox / mu of the batch."""


def _of(where: str, settings: tuple[str, ...] = (), mask: str | None = None, **more: Any) -> Entry:
    return Entry(f"{_HERE}.{where}", settings, batch_mask=mask and f"{_HERE}.{mask}", **more)


_CLIP = ("clip_eps_low", "clip_eps_high")
_COV = ("cov_share", "cov_low", "cov_high")
_DECOUPLED = (*_CLIP, "dual_clip", "behavior_cap", "behavior_level")

POLICY_LOSSES: Mapping[str, Entry] = {
    "ppo": _of("ppo:ppo", (*_CLIP, "dual_clip"), has_proximal=False),
    "decoupled_ppo": _of("ppo:decoupled_ppo", _DECOUPLED),
    "tis": _of("ppo:decoupled_ppo", _DECOUPLED),
    "icepop": _of("ppo:icepop", (*_CLIP, "dual_clip", "ratio_low", "ratio_high", "behavior_level")),
    "gspo": _of("ppo:gspo", (*_CLIP, "behavior_cap"), aggregation="sequence_mean"),
    "gmpo": _of("ppo:gmpo", (*_CLIP, "behavior_cap"), aggregation="sequence_mean"),
    "clip_cov": _of("ppo:clip_cov", (*_CLIP, "dual_clip", "behavior_cap", *_COV), "ppo:cov_mask"),
    "kl_cov": _of("ppo:kl_cov", ("behavior_cap", "cov_share", "cov_coef"), "ppo:top_cov_mask"),
    "sapo": _of("trust_region:sapo", ("tau_pos", "tau_neg", "behavior_cap"), aggregation="sequence_mean"),
    "m2po": _of("trust_region:m2po", ("max_second_moment",), "trust_region:m2po_mask", has_proximal=False),
    "dppo": _of("trust_region:dppo", ("prob_delta", "ratio_high"), has_proximal=False),
    "dppo_kl": _of("trust_region:dppo_kl", ("max_divergence", "ratio_high"), has_proximal=False),
    "cispo": _of("weighted:cispo", ("ratio_low", "ratio_high"), has_proximal=False),
    "topr": _of("weighted:topr", ("ratio_low", "ratio_high"), has_proximal=False),
    "vespo": _of("weighted:vespo", ("power_pos", "decay_pos", "power_neg", "decay_neg"), has_proximal=False),
    "a_lol": _of(
        "weighted:a_lol", ("ratio_low", "ratio_high"), aggregation="constant_length", has_proximal=False
    ),
    "reinforce": _of("weighted:reinforce", has_proximal=False),
}
"""Functions of `policy.PolicyTokens`."""

GROUP_ADVANTAGES: Mapping[str, Entry] = {
    "grpo": _of("advantages:grpo", ("deviation",)),
    "dr_grpo": _of("advantages:dr_grpo"),
    "rloo": _of("advantages:rloo"),
    "remax": _of("advantages:remax"),
    "lite_ppo": _of("advantages:lite_ppo", ("deviation",)),
    "opo": _of("advantages:opo"),
    "opob": _of("advantages:opob", needs_ratios=True),
    "pass_at_k": _of("advantages:pass_at_k", ("pass_k", "success_above")),
    "canon": _of("advantages:canon", ("inter_share",)),
    "pacs": _of("advantages:pacs", ("score_scale", "success_above"), needs_ratios=True),
    "max_rl": _of("advantages:max_rl"),
    "ngrpo": _of("advantages:ngrpo", ("max_reward", "deviation")),
    "nsr": _of("advantages:nsr", ("success_above", "positive_weight")),
    "psr": _of("advantages:psr", ("success_above",)),
    "reinforce_pp": _of("advantages:reinforce_pp"),
    "reinforce_pp_baseline": _of("advantages:reinforce_pp_baseline"),
}
"""Functions of `advantages.Outcomes`: one advantage for each trajectory."""

TOKEN_ADVANTAGES: Mapping[str, Entry] = {
    "gae": _of("gae:gae", ("gamma", "lam")),
    "vtrace": _of("gae:vtrace", ("gamma", "lam", "rho_bar", "c_bar"), needs_ratios=True),
}
"""One advantage for each token, from a critic's values."""

STEP_ADVANTAGES: Mapping[str, Entry] = {"otb": _of("otb:otb")}
"""One advantage for each token, from the rewards of a group and how uncertain its tokens were."""

TURN_ADVANTAGES: Mapping[str, Entry] = {
    "turn_gae": _of("turns:turn_gae", ("gamma", "lam")),
    "turn_grpo": _of("turns:turn_grpo", ("gamma", "deviation")),
}
"""Functions of `turns.Turns`: one advantage for each turn of an episode."""

OF_TOKENS = {**TOKEN_ADVANTAGES, **STEP_ADVANTAGES, **TURN_ADVANTAGES}
"""Advantages that are not the same for a whole response."""

ADVANTAGES = {**GROUP_ADVANTAGES, **OF_TOKENS}

BY_CRITIC = (*TOKEN_ADVANTAGES, "turn_gae")

COMPARE_WITHIN_GROUPS = frozenset(GROUP_ADVANTAGES) - {
    *("remax", "pacs", "ngrpo", "nsr", "psr", "reinforce_pp")
}
"""Advantages that are 0 where a group's rewards are all equal, as in a group of one (in
`reinforce_pp_baseline` before the mean over the batch's tokens is taken off)."""

JUDGE_SUCCESS = frozenset({"pass_at_k", "pacs", "max_rl", "ngrpo", "nsr", "psr"})
"""Advantages of whether, or how often, a response succeeded, from rewards of a known range."""

PASS_K = 4
"""The k of `pass_at_k` by default."""

WHITENED_OVER_TOKENS = {"reinforce_pp": None, "reinforce_pp_baseline": "dr_grpo"}
"""Advantages that are whitened over the batch's tokens, and what they are before that (None: the rewards)."""

REJECTIONS = tuple(
    f"{how}_{k}" for how in ("sum", "mean", "max") for k in ("k1", "k2", "k3") if (how, k) != ("max", "k1")
)
"""See `rejection`."""

PROXIMALS = ("recompute", "loglinear", "ewma", "behavior")
"""See `proximal`."""

KL_ESTIMATORS = ("k1", "k2", "k3")
"""See `kl`."""

AGGREGATIONS = ("token_mean", "sequence_mean", "constant_length")
"""See `normalise`."""


def is_own(name: str) -> bool:
    """Whether `name` is a user's own function, `package.module:function` or `path/file.py:function`."""
    return ":" in name
