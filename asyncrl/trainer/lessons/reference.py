"""The frozen policy that the KL divergence is measured from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from asyncrl.config import Config, ReferenceConfig
from asyncrl.objective.kl import k1_penalty, kl_loss
from asyncrl.objective.policy import PolicyTokens
from asyncrl.trainer.lesson import Lesson
from asyncrl.trainer.lessons.frozen import FrozenPolicy, load_frozen
from asyncrl.trainer.packing.batch import FlatBatch, TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch
from asyncrl.trainer.ranks import Ranks


class Reference(Lesson):
    """What the divergence from it costs, as rewards (`where: reward`) or as a loss."""

    def __init__(self, frozen: FrozenPolicy, config: ReferenceConfig) -> None:
        self.model = frozen.policy
        self.needs_start = config.where == "reward"
        self._frozen = frozen
        self._config = config

    def begin(self, minis: Sequence[MiniBatch], flat: FlatBatch, tokens: TokenBatch, step: int) -> FlatBatch:
        self._logprobs = self._frozen.logprobs(minis, tokens)
        if self._config.where == "reward":
            penalty = k1_penalty(tokens.start_logprobs, self._logprobs, tokens.mask)
            self.token_rewards = -self._config.kl_coef * penalty
        return flat

    def loss(self, at: Tensor, seen: PolicyTokens, read: Tensor | None) -> Tensor | None:
        if self._config.where == "reward":
            return None
        return self._config.kl_coef * kl_loss(
            self._config.estimator,
            seen.logprobs,
            self._logprobs[at],
            seen.behavior_logprobs,
            seen.mask,
            ratio_cap=math.inf if self._config.ratio_cap is None else self._config.ratio_cap,
        )


def load_reference(config: Config, ranks: Ranks, base: FrozenPolicy | None) -> Reference:
    """`reference.path`, or the initial policy, loaded unless it is the `base`. Raises `ModelError`."""
    section = config.reference
    assert section is not None
    frozen = load_frozen(config, "reference.path", section.path, ranks, base, offload=section.offload)
    return Reference(frozen, section)
