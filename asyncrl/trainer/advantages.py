"""From rewards to the advantage of every token: the same for a whole response, or as `token_advantages` has
it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from asyncrl.config import ObjectiveConfig
from asyncrl.objective.advantages import Outcomes
from asyncrl.objective.catalogue import ADVANTAGES, OF_TOKENS, STEP_ADVANTAGES, WHITENED_OVER_TOKENS
from asyncrl.objective.make import make_advantage
from asyncrl.trainer.packing.batch import FlatBatch, TokenBatch


class AdvantageEstimator:
    """`objective.advantage`, of whichever kind. needs_ratios, needs_norms: whether it asks for
    `start_logprobs`, and `score_norms`."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self._name = name = config.advantage
        self.needs_ratios = name in ADVANTAGES and ADVANTAGES[name].needs_ratios
        self.needs_norms = name in STEP_ADVANTAGES
        self._estimate = make_advantage(name, config.settings_of(name))
        self._of_tokens = None
        if name in OF_TOKENS:
            from asyncrl.trainer.token_advantages import by_token  # which few runs need

            self._of_tokens = by_token(config, self._estimate)

    def __call__(
        self, flat: FlatBatch, tokens: TokenBatch, token_rewards: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(advantages, targets for the critic), float32[T] each; None without a critic. Every rank has the
        whole batch, and computes the same. token_rewards: float32[T], beside those of whole responses."""
        if self._of_tokens is not None:
            return self._of_tokens(flat, tokens, token_rewards)
        # What is compared are members, each with one reward however many segments it has.
        firsts = flat.first_segments()
        members = torch.from_numpy(np.repeat(np.arange(len(firsts)), np.diff(flat.offsets[[*firsts, -1]])))
        rewards = torch.from_numpy(flat.rewards[firsts])
        if token_rewards is not None and self._name in WHITENED_OVER_TOKENS:
            from asyncrl.trainer.token_advantages import whitened_to_go  # which few runs need

            outcomes, before = _outcomes(flat, rewards), WHITENED_OVER_TOKENS[self._name]
            values = outcomes.rewards if before is None else make_advantage(before, {})(outcomes)
            return whitened_to_go(values, flat, tokens, token_rewards), None
        if token_rewards is not None:
            rewards = rewards.index_add(0, members, token_rewards.double().cpu())
        outcomes = _outcomes(flat, rewards)
        if self.needs_ratios:
            sums = torch.zeros_like(rewards).index_add(0, members, tokens.log_ratio.double().cpu())
            outcomes = replace(outcomes, log_ratios=sums)
        return self._estimate(outcomes).float()[members].to(tokens.ids.device), None


def _outcomes(flat: FlatBatch, rewards: Tensor) -> Outcomes:
    """rewards: float64[M], of each member."""
    firsts = flat.first_segments()
    lengths, sampled_lengths = (
        torch.from_numpy(np.add.reduceat(tokens, flat.offsets[firsts], dtype=np.int64))
        for tokens in (flat.loss_mask, flat.sampled)
    )
    baselines = None if flat.baselines is None else torch.from_numpy(flat.baselines[firsts])
    group_ids = torch.from_numpy(flat.group_ids[firsts])
    return Outcomes(rewards, group_ids, lengths, baselines=baselines, sampled_lengths=sampled_lengths)
