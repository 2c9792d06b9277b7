"""A bonus for entropy, whose weight may follow a target."""

from __future__ import annotations

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
        self._sums = torch.zeros(2, dtype=torch.float64, device=tokens.ids.device)
        return flat

    def loss(self, at: Tensor, seen: PolicyTokens, read: Tensor | None) -> Tensor | None:
        assert seen.entropies is not None
        if self._control is None:
            return -self._config.entropy_coef * seen.entropies
        known = torch.where(seen.mask, seen.entropies.detach().double(), 0.0)
        self._sums += torch.stack([known.sum(), seen.mask.sum().double()])
        return -self._control.coef * seen.entropies if self._control.coef else None

    def metrics(self) -> dict[str, float]:
        """The weight of the step; from then on it is that of the next."""
        if self._control is None:
            return {}
        told = {"entropy/coef": self._control.coef}
        total, tokens = self._ranks.sum_on_host(self._sums.to("cpu", copy=True)).tolist()
        if tokens:
            self._control.follow(total / tokens)
        return told


class Control:
    """Follows the entropy of the steps. `Stateful`: `count` is 1 where the bonus counts."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self._config = config
        self._weight = 0.0
        self.count = 0

    @property
    def coef(self) -> float:
        return self.count * self._weight

    def follow(self, entropy: float) -> None:
        """entropy: the mean of a step's tokens, in nats."""
        config = self._config
        assert config.entropy_target is not None
        self.count = int(entropy < config.entropy_target)
        moved = self._weight + (config.entropy_step if self.count else -config.entropy_step)
        self._weight = min(max(moved, 0.0), config.entropy_coef)

    def shapes(self) -> Shapes:
        return {}

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        yield "value", "weight", torch.tensor(self._weight, dtype=torch.float64)

    def load(self, saved: SavedPart) -> None:
        self.count, self._weight = saved.count, saved("value", "weight").item()
