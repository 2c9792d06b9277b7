"""Objectives with the gradient of c·A·log pi_theta: the advantage of each token, weighted by a ratio that
carries no gradient, where nothing is clipped away for its ratio."""

from __future__ import annotations

import torch

from asyncrl.objective.policy import PolicyTerms, PolicyTokens, r_ratio, score, sequence_ratio


def reinforce(tokens: PolicyTokens) -> PolicyTerms:
    """REINFORCE without any correction, as if the data were fresh.

        gradient of -A·log pi_theta

    Source: Williams 1992; for language models, Ahmadian et al. 2024 (arXiv 2402.14740).
    """
    return PolicyTerms(-tokens.known_advantages * score(tokens), torch.zeros_like(tokens.mask))


def cispo(tokens: PolicyTokens, *, ratio_low: float = 0.0, ratio_high: float = 5.0) -> PolicyTerms:
    """CISPO: the importance ratio is clipped, the gradient is not.

        gradient of -sg(clip(r, ratio_low, ratio_high))·A·log pi_theta

    The paper tunes the upper bound only; 5 is within the range that Khatri et al. 2025 (ScaleRL, arXiv
    2510.13786) found not to matter.

    Source: MiniMax 2025 (arXiv 2506.13585).
    """
    weight = r_ratio(tokens).detach().clamp(ratio_low, ratio_high)
    return PolicyTerms(-weight * tokens.known_advantages * score(tokens), torch.zeros_like(tokens.mask))


def topr(tokens: PolicyTokens, *, ratio_low: float = 0.0, ratio_high: float = 1.0) -> PolicyTerms:
    """TOPR: good responses are learnt from as they are, bad ones as far as the policy still gives them.

        R = product of r over the sequence
        gradient of -c·A·log pi_theta,   c = 1 where A > 0, sg(clip(R, ratio_low, ratio_high)) elsewhere

    R is the trajectory's ratio, as in the paper, so that a response that the policy has left loses its
    weight as a whole.

    Source: Le Roux et al. 2025 (arXiv 2503.14286).
    """
    advantages = tokens.known_advantages
    whole = sequence_ratio(tokens.logprobs, tokens.behavior_logprobs, tokens, "sum")
    tapered = whole.clamp(ratio_low, ratio_high).to(advantages.dtype)
    weight = torch.where(advantages > 0, 1.0, tapered)
    return PolicyTerms(-weight * advantages * score(tokens), torch.zeros_like(tokens.mask))


def a_lol(tokens: PolicyTokens, *, ratio_low: float = 0.1, ratio_high: float = 1.9) -> PolicyTerms:
    """A-LoL: only what did better than expected is learnt from, by the clipped ratio of the whole response.

        R = product of r over the sequence
        gradient of -c·A·log pi_theta,   c = sg(clip(R, ratio_low, ratio_high)) where A > 0, 0 elsewhere

    Source: Baheti et al. 2024 (arXiv 2305.14718), whose bounds are 1 - 0.9 and 1 + 0.9.
    """
    whole = sequence_ratio(tokens.logprobs, tokens.behavior_logprobs, tokens, "sum")
    gains = tokens.known_advantages.clamp(min=0)
    loss = -whole.clamp(ratio_low, ratio_high).to(gains.dtype) * gains * score(tokens)
    return PolicyTerms(loss, tokens.known_advantages < 0)


def vespo(
    tokens: PolicyTokens,
    *,
    power_pos: float = 2.0,
    decay_pos: float = 3.0,
    power_neg: float = 3.0,
    decay_neg: float = 2.0,
) -> PolicyTerms:
    """VESPO: a smooth weight of the trajectory's ratio, which fades both for what the policy has left and for
    what it has come to far more often than mu.

        R = product of r over the sequence
        gradient of -phi·A·log pi_theta,   phi = sg(R^power · exp(decay·(1 - R))),
        power and decay those of pos where A >= 0, of neg elsewhere

    phi is 1 on policy. Without the normalisation of length by which `gspo` and `gmpo` tame R.

    Source: Shen et al. 2026 (arXiv 2602.10693); the defaults are those of its implementation.
    """
    advantages = tokens.known_advantages
    whole = sequence_ratio(tokens.logprobs, tokens.behavior_logprobs, tokens, "sum")
    power = torch.where(advantages >= 0, power_pos, power_neg)
    decay = torch.where(advantages >= 0, decay_pos, decay_neg)
    phi = (power * whole.log() + decay * (1 - whole)).exp().to(advantages.dtype)
    return PolicyTerms(-phi * advantages * score(tokens), torch.zeros_like(tokens.mask))
