"""The reference policy of a run that trains an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from asyncrl.trainer.lessons.frozen import FrozenPolicy
from asyncrl.trainer.lora.adapter import Adapter
from asyncrl.trainer.models.policy import Policy
from asyncrl.trainer.packing.batch import TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch
from asyncrl.trainer.ranks import Ranks


class AdapterOff(FrozenPolicy):
    """The trained policy with its adapter off: no model of its own."""

    def __init__(self, adapter: Adapter, ranks: Ranks) -> None:
        # There is nothing to put away between two batches.
        super().__init__(cast(Policy, adapter.trained), ranks, offload=False)
        self._adapter = adapter

    def logprobs(self, minis: Sequence[MiniBatch], tokens: TokenBatch) -> Tensor:
        with self._adapter.off():
            return super().logprobs(minis, tokens)
