"""The frozen policy that the KL divergence is measured from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from asyncrl.config import Config, ReferenceConfig
from asyncrl.objective.kl import k1_penalty, kl_loss
from asyncrl.objective.policy import PolicyTokens
from asyncrl.trainer.models.policy import Policy, load_policy
from asyncrl.trainer.packing.batch import TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch, batch_logprobs
from asyncrl.trainer.ranks import Ranks


class Reference:
    """What the divergence from it costs, as rewards (`in_reward`) or as a loss. With `reference.offload` the
    policy lies in host memory between two batches."""

    def __init__(self, policy: Policy, ranks: Ranks, config: ReferenceConfig) -> None:
        self.policy = policy
        self.in_reward = config.where == "reward"
        self._config = config
        self._ranks = ranks
        self._device = policy.device
        self._park()

    def logprobs(self, minis: Sequence[MiniBatch], ids: Tensor) -> Tensor:
        """float32[T]: of every trained token of the batch (ids: int64[T]), 0 elsewhere."""
        self.policy.to(self._device)
        result = batch_logprobs(self.policy, minis, ids, self._ranks)
        self._park()
        return result

    def rewards(self, tokens: TokenBatch) -> Tensor:
        """float32[T]: further rewards of the batch's tokens."""
        return -self._config.kl_coef * k1_penalty(tokens.start_logprobs, tokens.ref_logprobs, tokens.mask)

    def loss(self, seen: PolicyTokens, ref_logprobs: Tensor) -> Tensor:
        """float32[N]: further loss of a micro-batch's tokens. ref_logprobs: float32[N]."""
        return self._config.kl_coef * kl_loss(
            self._config.estimator,
            seen.logprobs,
            ref_logprobs,
            seen.behavior_logprobs,
            seen.mask,
            ratio_cap=math.inf if self._config.ratio_cap is None else self._config.ratio_cap,
        )

    def _park(self) -> None:
        if self._config.offload:
            self.policy.to("cpu")


def load_reference(config: Config, ranks: Ranks) -> Reference:
    """Load `reference.path`, or the initial policy. Raises `ModelError`."""
    assert config.reference is not None
    with torch.no_grad():
        policy = load_policy(config, "reference.path", config.reference.path)
    return Reference(policy.requires_grad_(False), ranks, config.reference)
