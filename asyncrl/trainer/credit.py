"""From rewards to the advantage of every token: the same for a whole response, or token by token by the
critic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asyncrl.config import Config
from asyncrl.objective.advantages import Outcomes
from asyncrl.objective.catalogue import TOKEN_ADVANTAGES
from asyncrl.objective.gae import Steps, whiten, whitening_sums
from asyncrl.objective.make import make_group_advantage, make_token_advantage
from asyncrl.objective.policy import ratio
from asyncrl.trainer.packing.batch import FlatBatch


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a batch of T tokens before it is trained on: float32[T] each, on the policy's device.

    values: V before each token, of the critic as it is now. log_ratio: log pi_prox - log mu. token_rewards:
    rewards at tokens, beside those of whole responses. Each None where nothing asked for it.
    """

    values: Tensor | None = None
    log_ratio: Tensor | None = None
    token_rewards: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Assigned:
    """advantages: float32[T]. targets: float32[T], for the critic; None without one."""

    advantages: Tensor
    targets: Tensor | None = None


class Credit:
    """`objective.advantage`, whatever its kind.

    needs_values, needs_ratios: what it asks of the `Evidence`.
    """

    def __init__(self, config: Config) -> None:
        name = config.objective.advantage
        settings = config.objective.settings_of(name)
        self.needs_values = name in TOKEN_ADVANTAGES
        self.needs_ratios = name == "vtrace"
        if self.needs_values:
            self._of_tokens = make_token_advantage(name, settings)
        else:
            self._of_groups = make_group_advantage(name, settings)
        self._whiten = config.objective.whiten

    def assign(self, flat: FlatBatch, evidence: Evidence, device: torch.device) -> Assigned:
        """Every rank has the whole batch, and computes the same."""
        if self.needs_values:
            return self._by_critic(flat, evidence, device)
        return Assigned(self._by_group(flat, evidence, device))

    def _by_group(self, flat: FlatBatch, evidence: Evidence, device: torch.device) -> Tensor:
        rewards = torch.from_numpy(flat.rewards)
        if evidence.token_rewards is not None:
            rewards = rewards.index_add(0, flat.sequence_index(), evidence.token_rewards.double().cpu())
        lengths = torch.from_numpy(np.add.reduceat(flat.loss_mask, flat.offsets[:-1], dtype=np.int64))
        outcomes = Outcomes(rewards, torch.from_numpy(flat.group_ids), lengths)
        return self._of_groups(outcomes).float()[flat.sequence_index()].to(device)

    def _by_critic(self, flat: FlatBatch, evidence: Evidence, device: torch.device) -> Assigned:
        assert evidence.values is not None
        mask = torch.from_numpy(flat.loss_mask).to(device)
        steps = Steps(
            values=evidence.values,
            rewards=torch.from_numpy(flat.rewards).to(device),
            sequences=flat.sequence_index().to(device),
            mask=mask,
            token_rewards=evidence.token_rewards,
        )
        if self.needs_ratios:
            assert evidence.log_ratio is not None
            ratios = ratio(evidence.log_ratio, torch.zeros_like(evidence.log_ratio), mask)
            advantages, targets = self._of_tokens(steps, ratios)
        else:
            advantages, targets = self._of_tokens(steps)
        if self._whiten:
            advantages = whiten(advantages, mask, whitening_sums(advantages, mask))
        return Assigned(advantages, targets)
