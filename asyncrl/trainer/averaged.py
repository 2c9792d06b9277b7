"""The proximal policy as an average of the policy's past weights (PPO-EWMA)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from asyncrl.objective.proximal import ewma_update
from asyncrl.trainer.models.policy import Policy
from asyncrl.trainer.offload import Parking
from asyncrl.trainer.state import WEIGHT, SavedPart, Shapes


class AveragedPolicy:
    """A second policy, whose weights follow the trained one's. `Stateful`, with the number of updates that it
    has followed as its count."""

    def __init__(self, policy: Policy, decay: float) -> None:
        self._policy = policy
        self._decay = decay
        self.count = 0
        self.average = copy.deepcopy(policy).requires_grad_(False)
        self._parking = Parking()

    def follow(self) -> None:
        """After each update of the policy's weights."""
        self.count += 1
        ewma_update(self.average.parameters(), self._policy.parameters(), self.count, ewma_decay=self._decay)

    def shapes(self) -> Shapes:
        return {WEIGHT: {name: tuple(tensor.shape) for _, name, tensor in self.tensors()}}

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, parameter in self.average.model.named_parameters():
            yield WEIGHT, name, parameter

    def offload(self) -> None:
        self._parking.put((*self.average.parameters(), *self.average.buffers()))

    def reload(self) -> None:
        self._parking.bring_back()

    @torch.no_grad()
    def load(self, saved: SavedPart) -> None:
        for kind, name, tensor in self.tensors():
            tensor.copy_(saved(kind, name))
        self.count = saved.count
