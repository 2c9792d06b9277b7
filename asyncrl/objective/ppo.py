"""Objectives with PPO's clip: naive, decoupled with each kind of correction, and by sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from asyncrl.objective.policy import (
    PolicyTerms,
    PolicyTokens,
    left_out,
    log_ratio,
    over_sequences,
    r_ratio,
    score,
    sequence_ratio,
    u_ratio,
    w_ratio,
)


def clipped_surrogate(
    ratios: Tensor, advantages: Tensor, clip_eps_low: float, clip_eps_high: float, dual_clip: float
) -> tuple[Tensor, Tensor]:
    """min(ratio·A, clip(ratio, 1 - clip_eps_low, 1 + clip_eps_high)·A) [N], and for A < 0 at least
    dual_clip·A; which tokens were clipped [N], and so have no gradient."""
    bounded = ratios.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    clipped = bounded * advantages < ratios * advantages
    surrogate = torch.where(clipped, bounded, ratios) * advantages
    lowest = dual_clip * advantages
    too_low = (advantages < 0) & (surrogate < lowest)
    return torch.where(too_low, lowest, surrogate), clipped | too_low


def ppo(
    tokens: PolicyTokens,
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float = math.inf,
) -> PolicyTerms:
    """PPO with the behaviour policy as the centre of the clip, as if the data were fresh.

        loss = -min(r·A, clip(r, 1 - clip_eps_low, 1 + clip_eps_high)·A)

    Stale tokens lie outside the clip from the start: half of them lose their gradient. The baseline that
    shows what staleness costs. `dual_clip` bounds the loss of tokens with A < 0 by dual_clip·|A|.

    Source: Schulman et al. 2017 (arXiv 1707.06347); dual clip: Ye et al. 2020 (arXiv 1912.09729).
    """
    advantages = tokens.known_advantages
    surrogate, clipped = clipped_surrogate(
        r_ratio(tokens), advantages, clip_eps_low, clip_eps_high, dual_clip
    )
    return PolicyTerms(-surrogate, clipped)


def decoupled_ppo(
    tokens: PolicyTokens,
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float = math.inf,
    behavior_cap: float = 2.0,
    behavior_level: str = "token",
) -> PolicyTerms:
    """Decoupled PPO: the clip is centred on the proximal policy, the sampling corrected to the behaviour
    policy.

        loss = -sg(min(w, behavior_cap)) · min(u·A, clip(u, 1 - clip_eps_low, 1 + clip_eps_high)·A)

    The correction w is always applied; `behavior_cap` truncates it, infinity leaves it whole. `dual_clip`
    as in `ppo`, on u. `behavior_level`: whose ratio w is, the token's, the whole `sequence`'s (the product),
    or its `geometric` mean. Only the sequence's, uncapped, is unbiased; the token's ignores how likely the
    prefix has become. `tis` is another name of it, by which it is known for the mismatch of engine and
    trainer (Yao et al. 2025; truncation: Espeholt et al. 2018, arXiv 1802.01561).

    Source: Hilton, Cobbe, Schulman 2022 (arXiv 2110.00641), and Fu et al. 2025 (AReaL, arXiv 2505.24298);
    separate clip bounds: Yu et al. 2025 (DAPO, arXiv 2503.14476).
    """
    surrogate, clipped = clipped_surrogate(
        u_ratio(tokens), tokens.known_advantages, clip_eps_low, clip_eps_high, dual_clip
    )
    return PolicyTerms(-w_ratio(tokens, behavior_level).clamp(max=behavior_cap) * surrogate, clipped)


def icepop(
    tokens: PolicyTokens,
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float = math.inf,
    ratio_low: float = 0.5,
    ratio_high: float = 5.0,
    behavior_level: str = "token",
) -> PolicyTerms:
    """IcePop, masked importance sampling: tokens on which trainer and sampler disagree too much are left out.

        loss = -sg(w if ratio_low <= w <= ratio_high else 0)
               · min(u·A, clip(u, 1 - clip_eps_low, 1 + clip_eps_high)·A)

    Tokens left out stay in the denominator of the mean. `behavior_level` as in `decoupled_ppo`.

    Source: Ling Team 2025, "Every step evolves" (arXiv 2510.18855).
    """
    w = w_ratio(tokens, behavior_level)
    outside = (w < ratio_low) | (w > ratio_high)
    surrogate, clipped = clipped_surrogate(
        u_ratio(tokens), tokens.known_advantages, clip_eps_low, clip_eps_high, dual_clip
    )
    return PolicyTerms(-torch.where(outside, 0.0, w) * surrogate, clipped | outside)


def gspo(
    tokens: PolicyTokens,
    *,
    clip_eps_low: float = 3e-4,
    clip_eps_high: float = 4e-4,
    behavior_cap: float = 2.0,
) -> PolicyTerms:
    """GSPO: the clip acts on whole sequences, by the geometric mean of their tokens' ratios.

        s = exp(mean over the sequence of log u)
        loss = -sg(min(w, behavior_cap)) · min(s·A, clip(s, 1 - clip_eps_low, 1 + clip_eps_high)·A)

    In the form of its equation 14 (GSPO-token), in which the gradient of s at a token is
    s·grad log pi_theta: the same gradient under `sequence_mean` when a sequence has one advantage. The paper
    is on policy up to its mini-batches; w corrects for what is older. With `objective.proximal: behavior`
    w is 1 and this is the paper's formula.

    Source: Zheng et al. 2025 (arXiv 2507.18071).
    """
    mean = sequence_ratio(tokens.logprobs, tokens.prox_logprobs, tokens, "mean")
    s = mean.to(tokens.logprobs.dtype) * score(tokens)
    surrogate, clipped = clipped_surrogate(s, tokens.known_advantages, clip_eps_low, clip_eps_high, math.inf)
    return PolicyTerms(-w_ratio(tokens).clamp(max=behavior_cap) * surrogate, clipped)


def gmpo(
    tokens: PolicyTokens,
    *,
    clip_eps_low: float = 0.4,
    clip_eps_high: float = 0.4,
    behavior_cap: float = 2.0,
) -> PolicyTerms:
    """GMPO: the geometric mean of the tokens' ratios as in `gspo`, but each token's is clipped, not the mean.

        l = min(log u, clip_eps_high) where A > 0, max(log u, -clip_eps_low) elsewhere
        loss = -sg(min(w, behavior_cap)) · exp(mean over the sequence of l)·A

    A token whose log u is clipped has no gradient, those beside it keep theirs. For one advantage a sequence;
    the gradient at a token is that of `gspo`'s form. w as in `gspo`.

    Source: Zhao et al. 2025 (arXiv 2507.20673), whose bounds are e^-0.4 and e^0.4.
    """
    advantages = tokens.known_advantages
    log_u = log_ratio(tokens.logprobs.detach(), tokens.prox_logprobs.detach(), tokens.mask)
    bounded = torch.where(advantages > 0, log_u.clamp(max=clip_eps_high), log_u.clamp(min=-clip_eps_low))
    clipped = bounded != log_u
    mean = over_sequences(bounded, tokens, "mean").exp().to(advantages.dtype)
    weight = w_ratio(tokens).clamp(max=behavior_cap) * mean * advantages
    return PolicyTerms(-weight * torch.where(clipped, 1.0, score(tokens)), clipped)


def clip_cov(
    tokens: PolicyTokens,
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float = math.inf,
    behavior_cap: float = 2.0,
) -> PolicyTerms:
    """Clip-Cov: `decoupled_ppo`, and a few of the tokens that cost entropy are left out (`cov_mask`).

        loss = -M·sg(min(w, behavior_cap)) · min(u·A, clip(u, 1 - clip_eps_low, 1 + clip_eps_high)·A)

    M is 0 for tokens left out, which stay in the denominator of the mean.

    Source: Cui et al. 2025 (arXiv 2505.22617). Raises `ValueError` without `tokens.kept`.
    """
    loss, clipped = decoupled_ppo(
        tokens,
        clip_eps_low=clip_eps_low,
        clip_eps_high=clip_eps_high,
        dual_clip=dual_clip,
        behavior_cap=behavior_cap,
    )
    out = left_out(tokens)
    return PolicyTerms(torch.where(out, 0.0, loss), clipped | out)


def cov_mask(
    tokens: PolicyTokens, *, cov_share: float = 2e-4, cov_low: float = 1.0, cov_high: float = 5.0
) -> Tensor:
    """bool[T]: which tokens of a mini-batch Clip-Cov keeps. False where masked.

        cov = (A - mean of A)·(log pi_theta - mean of log pi_theta), means over the unmasked tokens

    Of those with cov_low < cov < cov_high, cov_share of the number of all tokens (at least one) are left out
    at random. They are among those by which an update lowers the entropy more than by most.

    Source: Cui et al. 2025 (arXiv 2505.22617), where the defaults are from.
    """
    kept, cov = tokens.mask.clone(), _covariances(tokens)
    candidates = kept.nonzero()[(cov > cov_low) & (cov < cov_high), 0]
    drawn = torch.randperm(len(candidates))[: max(1, int(cov_share * len(cov)))].to(candidates.device)
    kept[candidates[drawn]] = False
    return kept


def kl_cov(tokens: PolicyTokens, *, behavior_cap: float = 2.0, cov_coef: float = 1.0) -> PolicyTerms:
    """KL-Cov: no clip; a few of the tokens that cost entropy are held where they are (`top_cov_mask`).

        loss = sg(min(w, behavior_cap)) · (-u·A + (1 - M)·cov_coef·|log u|)

    M is 0 for tokens that are held. It is felt from a step's second update on; in the first, u is 1.

    Source: Cui et al. 2025 (arXiv 2505.22617). Raises `ValueError` without `tokens.kept`.
    """
    log_u = log_ratio(tokens.logprobs, tokens.prox_logprobs.detach(), tokens.mask)
    hold = torch.where(left_out(tokens), cov_coef * log_u.abs(), 0.0)
    loss = w_ratio(tokens).clamp(max=behavior_cap) * (hold - log_u.exp() * tokens.known_advantages)
    return PolicyTerms(loss, torch.zeros_like(tokens.mask))


def top_cov_mask(tokens: PolicyTokens, *, cov_share: float = 2e-4) -> Tensor:
    """bool[T]: all tokens of a mini-batch but those that KL-Cov holds, which are cov_share of them (at least
    one), those of the largest cov of `cov_mask`. False where masked."""
    kept, cov = tokens.mask.clone(), _covariances(tokens)
    kept[kept.nonzero()[cov.topk(min(len(cov), max(1, int(cov_share * len(cov))))).indices, 0]] = False
    return kept


def _covariances(tokens: PolicyTokens) -> Tensor:
    """float64: of the unmasked tokens, the parts of the covariance of advantage and log-probability."""
    a, logprobs = (x[tokens.mask].double() for x in (tokens.advantages, tokens.logprobs.detach()))
    return (a - a.mean()) * (logprobs - logprobs.mean())
