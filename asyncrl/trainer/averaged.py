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
    has followed as its count.

    The average itself is float32 whatever the model's dtype: in bfloat16 a ninth of a small difference is
    rounded to nothing, and the average would never move."""

    def __init__(self, policy: Policy, decay: float) -> None:
        self._policy = policy
        self._decay = decay
        self.count = 0
        self.average = copy.deepcopy(policy).requires_grad_(False)
        self._means = {name: p.float() for name, p in self.average.model.named_parameters()}
        self._parking = Parking()

    def follow(self) -> None:
        """After each update of the policy's weights."""
        self.count += 1
        weights = self._policy.model.parameters()
        ewma_update(self._means.values(), weights, self.count, ewma_decay=self._decay)
        self._take_over()

    def shapes(self) -> Shapes:
        return {WEIGHT: {name: tuple(tensor.shape) for _, name, tensor in self.tensors()}}

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        for name, mean in self._means.items():
            yield WEIGHT, name, mean

    def offload(self) -> None:
        self._parking.put((*self.average.parameters(), *self.average.buffers(), *self._means.values()))

    def reload(self) -> None:
        self._parking.bring_back()

    @torch.no_grad()
    def load(self, saved: SavedPart) -> None:
        for kind, name, tensor in self.tensors():
            tensor.copy_(saved(kind, name))
        self.count = saved.count
        self._take_over()

    @torch.no_grad()
    def _take_over(self) -> None:
        for name, parameter in self.average.model.named_parameters():
            if parameter is not (mean := self._means[name]):  # as a float32 one is
                parameter.copy_(mean)
