"""The frozen policy that the KL divergence is measured from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from asyncrl.config import Config
from asyncrl.trainer.models.policy import Policy, load_policy
from asyncrl.trainer.packing.shares import MiniBatch
from asyncrl.trainer.passes import over_tokens
from asyncrl.trainer.ranks import Ranks


class Reference:
    """Log-probabilities under the reference. With `offload` it lies in host memory between two batches."""

    def __init__(self, policy: Policy, ranks: Ranks, *, offload: bool) -> None:
        self.policy = policy.requires_grad_(False)
        self._ranks = ranks
        self._device = policy.device
        self._offload = offload
        self._park()

    def logprobs(self, minis: Sequence[MiniBatch], ids: Tensor) -> Tensor:
        """float32[T]: of every trained token of the batch (ids: int64[T]), 0 elsewhere."""
        self.policy.to(self._device)
        result = over_tokens(
            minis, len(ids), self._ranks, lambda micro: self.policy(micro, ids[micro.token_index])[0]
        )
        self._park()
        return result

    def _park(self) -> None:
        if self._offload:
            self.policy.to("cpu")


def load_reference(config: Config, ranks: Ranks) -> Reference:
    """Load `reference.path`, or the initial policy. Raises `ModelError`."""
    assert config.reference is not None
    with torch.no_grad():
        policy = load_policy(config, "reference.path", config.reference.path)
    return Reference(policy, ranks, offload=config.reference.offload)
