"""One training step: a batch of groups in, updated weights and metrics out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from asyncrl.core.records import Batch
from asyncrl.trainer.advantages import AdvantageEstimator
from asyncrl.trainer.lesson import Lesson, summed
from asyncrl.trainer.metrics import advantage_metrics, batch_metrics
from asyncrl.trainer.packing.batch import (
    FlatBatch,
    TokenBatch,
    check_staleness,
    count_trained,
    flatten,
    split_groups,
)
from asyncrl.trainer.packing.mini_batch import MiniBatch, Packing, mini_batch
from asyncrl.trainer.policy_update import PolicyUpdate
from asyncrl.trainer.ranks import Ranks
from asyncrl.trainer.schedule import Schedule

if TYPE_CHECKING:
    from asyncrl.trainer.critic.update import CriticUpdate


@dataclass(frozen=True, slots=True)
class TrainStep:
    """Runs training steps, by parts that `trainer.make` chooses and sets up by the config.

    seed: of the run. max_length: tokens that a response may have. mini_batches: updates in a step, if the
    batch has as many groups. mask_truncated: whether responses that were cut off are left out.
    bootstrapped: puts the critic's value at their end in the place of their reward; None leaves them that.
    """

    seed: int
    max_staleness: int
    max_length: int
    mini_batches: int
    packing: Packing
    ranks: Ranks
    advantages: AdvantageEstimator
    policy: PolicyUpdate
    lr: Schedule
    critic: CriticUpdate | None = None
    critic_lr: Schedule | None = None
    lessons: Sequence[Lesson] = ()
    mask_truncated: bool = False
    bootstrapped: Callable[[FlatBatch], FlatBatch] | None = None

    def __call__(self, batch: Batch, total_steps: int | None = None) -> dict[str, float]:
        """Train on a batch of records; the step's metrics. total_steps: as for `Trainer.step`."""
        flat = self.flatten(batch)
        return dict(batch_metrics(batch, flat)) | self.train(flat, batch.step, total_steps)

    def flatten(self, batch: Batch) -> FlatBatch:
        """What `train` takes. Raises `BatchError`."""
        flat = flatten(batch, mask_truncated=self.mask_truncated, bootstraps=self.bootstrapped is not None)
        for lesson in self.lessons:
            flat = lesson.flatten(batch, flat)
        return flat

    def train(self, flat: FlatBatch, step: int, total_steps: int | None = None) -> dict[str, float]:
        """Forward passes, advantages, then one optimizer update a mini-batch. Every rank gives the whole
        batch; returns the metrics of the whole batch, the same on all ranks.

        The mini-batches, and random numbers that an objective draws from torch, are a function of run.seed
        and the step, the same on all ranks: a run that goes on from a checkpoint draws the same, and there is
        no state of a generator to save."""
        seed = _seed(self.seed, step)
        torch.manual_seed(seed)
        check_staleness(flat, self.max_staleness)
        minis = self._mini_batches(flat, seed)
        if not minis:  # all that was sampled is masked
            return self.policy.metrics_of_none()
        tokens = self._forward_passes(minis, TokenBatch.of(flat, self.packing.device))
        for lesson in self.lessons:
            flat = lesson.begin(minis, flat, tokens, step)
        if self.bootstrapped is not None and flat.truncated.any():
            flat = self.bootstrapped(flat)
        token_rewards = summed(lesson.token_rewards for lesson in self.lessons)
        advantages, value_targets = self.advantages(flat, tokens, token_rewards)
        if (further := summed(lesson.advantages for lesson in self.lessons)) is not None:
            advantages = advantages + further
        metrics = advantage_metrics(flat, advantages, value_targets)
        if self.critic is not None:
            lr = self.critic_lr(step, total_steps)
            metrics |= self.critic.train(minis, tokens.values, value_targets, lr, step)
        metrics |= self.policy.train(minis, tokens, advantages, self.lr(step, total_steps), step)
        return metrics | {name: value for part in self.lessons for name, value in part.metrics().items()}

    def _mini_batches(self, flat: FlatBatch, seed: int) -> list[MiniBatch]:
        """Those with a token to train on."""
        return [
            mini_batch(flat, sequences, self.packing, self.ranks, self.max_length)
            for sequences in split_groups(flat, self.mini_batches, seed)
            if count_trained(flat, sequences)
        ]

    def _forward_passes(self, minis: Sequence[MiniBatch], tokens: TokenBatch) -> TokenBatch:
        """What the models say of the whole batch, as far as something asks for it, before any update."""
        needs_start = (
            self.policy.needs_start(len(minis))
            or self.advantages.needs_ratios
            or any(lesson.needs_start for lesson in self.lessons)
        )
        start = self.policy.logprobs(minis, tokens.ids) if needs_start else None
        norms = None
        if self.advantages.needs_norms:
            from asyncrl.trainer.lessons.score_norms import score_norms  # which few runs need

            norms = score_norms(self.policy.policy, minis, tokens.ids, self.ranks)
        return replace(
            tokens,
            start_logprobs=start,
            prox_logprobs=self.policy.prox_logprobs(start),
            values=None if self.critic is None else self.critic.values(minis, len(tokens.ids)),
            score_norms=norms,
        )


def _seed(run_seed: int, step: int) -> int:
    """64 bits that look random, different for every run and step."""
    return int(np.random.SeedSequence((run_seed, step)).generate_state(1, np.uint64)[0])
