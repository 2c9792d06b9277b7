"""A bonus for entropy, whose weight may follow a target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from asyncrl.config import ObjectiveConfig
from asyncrl.objective.policy import PolicyTokens
from asyncrl.trainer.lesson import Lesson
from asyncrl.trainer.packing.batch import FlatBatch, TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch
from asyncrl.trainer.ranks import Ranks
from asyncrl.trainer.state import SavedPart, Shapes


class EntropyBonus(Lesson):
    """Adds -coef·entropy to the loss of each token. Without a target coef is `entropy_coef`, always; with one
    it begins at 0, and after each step, whose tokens had the mean entropy e,

        c += entropy_step where e < entropy_target, -entropy_step elsewhere, within 0 and entropy_coef
        coef = c where e < entropy_target, 0 elsewhere

    Source: adaptive entropy control, He et al. 2025 (Skywork-OR1, arXiv 2505.22312).
    """

    def __init__(self, ranks: Ranks, config: ObjectiveConfig) -> None:
        self._ranks = ranks
        self._config = config
        self._control = None if config.entropy_target is None else Control(config)
        self.parts = {} if self._control is None else {"entropy": self._control}

    def begin(self, minis: Sequence[MiniBatch], flat: FlatBatch, tokens: TokenBatch, step: int) -> FlatBatch:
        self._sums = torch.zeros(2, dtype=torch.float64)
        return flat

    def loss(self, at: Tensor, seen: PolicyTokens, read: Tensor | None) -> Tensor | None:
        assert seen.entropies is not None
        known = seen.entropies.detach()[seen.mask].double()
        self._sums += torch.stack([known.sum(), known.new_tensor(len(known))]).cpu()
        coef = self._config.entropy_coef if self._control is None else self._control.coef
        return -coef * seen.entropies if coef else None

    def metrics(self) -> dict[str, float]:
        """The weight of the step; from then on it is that of the next."""
        if self._control is None:
            return {}
        told = {"entropy/coef": self._control.coef}
        total, tokens = self._ranks.sum_on_host(self._sums.clone()).tolist()
        if tokens:
            self._control.follow(total / tokens)
        return told


class Control:
    """Follows the entropy of the steps. `Stateful`: `count` says it all, twice the steps that c is up, and 1
    more where it counts."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self._config = config
        self.count = 0

    @property
    def coef(self) -> float:
        ups, counts = divmod(self.count, 2)
        return counts * min(ups * self._config.entropy_step, self._config.entropy_coef)

    def follow(self, entropy: float) -> None:
        """entropy: the mean of a step's tokens, in nats."""
        assert self._config.entropy_target is not None
        below = entropy < self._config.entropy_target
        most = math.ceil(self._config.entropy_coef / self._config.entropy_step)
        ups = min(max(self.count // 2 + (1 if below else -1), 0), most)
        self.count = 2 * ups + below

    def shapes(self) -> Shapes:
        return {}

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        yield from ()

    def load(self, saved: SavedPart) -> None:
        self.count = saved.count
