"""From rewards to the advantage of every token: the same for a whole response or turn, or token by token by
the critic."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from asyncrl.config import ObjectiveConfig
from asyncrl.objective.advantages import Outcomes
from asyncrl.objective.catalogue import (
    ADVANTAGES,
    STEP_ADVANTAGES,
    TOKEN_ADVANTAGES,
    TURN_ADVANTAGES,
    WHITENED_OVER_TOKENS,
)
from asyncrl.objective.gae import Steps, gae, whiten
from asyncrl.objective.make import make_advantage
from asyncrl.objective.policy import ratio
from asyncrl.trainer.packing.batch import FlatBatch, TokenBatch


class AdvantageEstimator:
    """`objective.advantage`, of whichever kind. needs_ratios, needs_norms: whether it asks for
    `start_logprobs`, and `score_norms`."""

    def __init__(self, config: ObjectiveConfig) -> None:
        name = config.advantage
        self.needs_ratios = name in ADVANTAGES and ADVANTAGES[name].needs_ratios
        self._estimate = make_advantage(name, config.settings_of(name))
        self.needs_norms = name in STEP_ADVANTAGES
        of_tokens = {**dict.fromkeys(TOKEN_ADVANTAGES, self._from_values), "otb": self._from_norms}
        self._of_tokens = of_tokens.get(name)
        if name in TURN_ADVANTAGES:
            from asyncrl.trainer.turns import by_turn  # which few runs need

            self._of_tokens = partial(by_turn, self._estimate)
        self._whiten = config.whiten
        self._whitens_tokens = name in WHITENED_OVER_TOKENS
        before = WHITENED_OVER_TOKENS.get(name)
        self._before_whitening = None if before is None else make_advantage(before, {})

    def __call__(
        self, flat: FlatBatch, tokens: TokenBatch, token_rewards: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(advantages, targets for the critic), float32[T] each; None without a critic. Every rank has the
        whole batch, and computes the same. token_rewards: float32[T], beside those of whole responses."""
        if self._of_tokens is not None:
            advantages, targets = self._of_tokens(flat, tokens, token_rewards)
            return whiten(advantages, tokens.mask) if self._whiten else advantages, targets
        # What is compared are members, each with one reward however many segments it has.
        firsts = flat.first_segments()
        members = torch.from_numpy(np.repeat(np.arange(len(firsts)), np.diff(flat.offsets[[*firsts, -1]])))
        rewards = torch.from_numpy(flat.rewards[firsts])
        if token_rewards is not None and self._whitens_tokens:
            return self._to_go(_outcomes(flat, rewards), flat, tokens, token_rewards), None
        if token_rewards is not None:
            rewards = rewards.index_add(0, members, token_rewards.double().cpu())
        outcomes = _outcomes(flat, rewards)
        if self.needs_ratios:
            sums = torch.zeros_like(rewards).index_add(0, members, tokens.log_ratio.double().cpu())
            outcomes = replace(outcomes, log_ratios=sums)
        return self._estimate(outcomes).float()[members].to(tokens.ids.device), None

    def _to_go(
        self, outcomes: Outcomes, flat: FlatBatch, tokens: TokenBatch, token_rewards: Tensor
    ) -> Tensor:
        """float32[T]: what follows each token, whitened: an earlier token's penalty is no fault of it."""
        rewards = outcomes.rewards if self._before_whitening is None else self._before_whitening(outcomes)
        if flat.members is not None:
            rewards = rewards[torch.from_numpy(flat.members)]
        zeros = torch.zeros_like(token_rewards)
        steps = Steps(zeros, rewards.to(zeros.device), tokens.sequences, tokens.mask, token_rewards)
        return whiten(gae(steps)[0], tokens.mask)

    def _from_values(
        self, flat: FlatBatch, tokens: TokenBatch, token_rewards: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        inputs = [_steps(flat, tokens, tokens.values, token_rewards)]
        if self.needs_ratios:
            inputs.append(ratio(tokens.start_logprobs, tokens.behavior_logprobs, tokens.mask))
        return self._estimate(*inputs)

    def _from_norms(
        self, flat: FlatBatch, tokens: TokenBatch, token_rewards: Tensor | None
    ) -> tuple[Tensor, None]:
        norms = tokens.score_norms
        group_ids = torch.from_numpy(flat.group_ids).to(tokens.ids.device)
        return self._estimate(_steps(flat, tokens, norms, token_rewards), norms, group_ids), None


def _steps(flat: FlatBatch, tokens: TokenBatch, values: Tensor | None, token_rewards: Tensor | None) -> Steps:
    rewards = torch.from_numpy(flat.rewards).to(tokens.ids.device)
    if flat.turn_rewards is not None:
        of_turns = torch.from_numpy(flat.turn_rewards).to(rewards.device)
        rewards = torch.zeros_like(rewards)
        token_rewards = of_turns if token_rewards is None else token_rewards + of_turns
    return Steps(values, rewards, tokens.sequences, tokens.mask, token_rewards)


def _outcomes(flat: FlatBatch, rewards: Tensor) -> Outcomes:
    """rewards: float64[M], of each member."""
    firsts = flat.first_segments()
    lengths = np.add.reduceat(flat.loss_mask, flat.offsets[firsts], dtype=np.int64)
    baselines = None if flat.baselines is None else torch.from_numpy(flat.baselines[firsts])
    group_ids = torch.from_numpy(flat.group_ids[firsts])
    return Outcomes(rewards, group_ids, torch.from_numpy(lengths), baselines=baselines)
