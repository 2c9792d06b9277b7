"""From rewards to the advantage of every token: the same for a whole response, or token by token by the
critic."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from asyncrl.config import ObjectiveConfig
from asyncrl.objective.advantages import Outcomes
from asyncrl.objective.catalogue import TOKEN_ADVANTAGES
from asyncrl.objective.gae import Steps, whiten
from asyncrl.objective.make import make_advantage
from asyncrl.objective.policy import ratio
from asyncrl.trainer.packing.batch import FlatBatch, TokenBatch


class AdvantageEstimator:
    """`objective.advantage`, of whichever kind. needs_ratios: whether it asks for `start_logprobs`."""

    def __init__(self, config: ObjectiveConfig) -> None:
        name = config.advantage
        self.needs_ratios = name == "vtrace"
        self._by_critic = name in TOKEN_ADVANTAGES
        self._estimate = make_advantage(name, config.settings_of(name))
        self._whiten = config.whiten

    def __call__(
        self, flat: FlatBatch, tokens: TokenBatch, token_rewards: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(advantages, targets for the critic), float32[T] each; None without a critic. Every rank has the
        whole batch, and computes the same. token_rewards: float32[T], beside those of whole responses."""
        if self._by_critic:
            return self._from_values(flat, tokens, token_rewards)
        rewards = torch.from_numpy(flat.rewards)
        if token_rewards is not None:
            rewards = rewards.index_add(0, flat.sequence_index(), token_rewards.double().cpu())
        lengths = torch.from_numpy(np.add.reduceat(flat.loss_mask, flat.offsets[:-1], dtype=np.int64))
        outcomes = Outcomes(rewards, torch.from_numpy(flat.group_ids), lengths)
        advantages = self._estimate(outcomes).float()[flat.sequence_index()]
        return advantages.to(tokens.ids.device), None

    def _from_values(
        self, flat: FlatBatch, tokens: TokenBatch, token_rewards: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rewards = torch.from_numpy(flat.rewards).to(tokens.ids.device)
        steps = Steps(tokens.values, rewards, tokens.sequences, tokens.mask, token_rewards)
        inputs = [steps]
        if self.needs_ratios:
            inputs.append(ratio(tokens.start_logprobs, tokens.behavior_logprobs, tokens.mask))
        advantages, targets = self._estimate(*inputs)
        return whiten(advantages, tokens.mask) if self._whiten else advantages, targets
