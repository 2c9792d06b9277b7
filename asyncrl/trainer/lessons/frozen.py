"""A policy that is not trained, and lies in host memory between two batches where it is to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from asyncrl.config import Config
from asyncrl.trainer.models.policy import Policy, load_policy
from asyncrl.trainer.packing.batch import TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch, batch_logprobs
from asyncrl.trainer.ranks import Ranks


class FrozenPolicy:
    def __init__(self, policy: Policy, ranks: Ranks, *, offload: bool) -> None:
        self.policy = policy
        self._ranks = ranks
        self._device = policy.device
        self._offload = offload
        self._park()

    def logprobs(self, minis: Sequence[MiniBatch], tokens: TokenBatch) -> Tensor:
        """float32[T]: of every trained token of the batch, 0 elsewhere."""
        self.policy.to(self._device)
        result = batch_logprobs(self.policy, minis, tokens.ids, self._ranks)
        self._park()
        return result

    def _park(self) -> None:
        if self._offload:
            self.policy.to("cpu")


def load_frozen(
    config: Config, key: str, path: str | None, ranks: Ranks, base: FrozenPolicy | None, *, offload: bool
) -> FrozenPolicy:
    """Load `path`, the value of the setting `key`, or the initial policy if there is no `base` that computes
    it. Raises `ModelError`."""
    if path is None and base is not None:
        return base
    with torch.no_grad():
        policy = load_policy(config, key, path)
    return FrozenPolicy(policy.requires_grad_(False), ranks, offload=offload or config.placement.in_turns)
