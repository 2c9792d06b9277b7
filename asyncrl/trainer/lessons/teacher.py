"""A stronger policy whose judgement of the student's own tokens is learnt from: on-policy distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asyncrl.config import Config, TeacherConfig
from asyncrl.objective.kl import k1_penalty, teachers_advantage
from asyncrl.objective.policy import PolicyTokens
from asyncrl.trainer.lesson import Lesson
from asyncrl.trainer.lessons.divergence import DivergenceFrom
from asyncrl.trainer.lessons.frozen import FrozenPolicy, load_frozen
from asyncrl.trainer.models.policy import Reading
from asyncrl.trainer.packing.batch import FlatBatch, TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch
from asyncrl.trainer.packing.pack import MicroBatch
from asyncrl.trainer.ranks import Ranks

if TYPE_CHECKING:
    from asyncrl.trainer.lessons.served import ServedPolicy


class Teacher(Lesson):
    """Pulls toward the teacher q by KL(pi_theta ‖ q) at every prefix that was sampled, these held fixed.

        sampled   A_t += kl_coef · (d_t - mean of d over the batch),  d_t = log q(y_t) - log pi(y_t)
        exact     loss_t += kl_coef · sum_v pi_theta(v) · (log pi_theta(v) - log q(v))

    Here pi is the policy that the step starts from. `sampled` goes the way of every advantage, importance
    ratios and clips included; but for the mean of d, a baseline (`objective.kl.teachers_advantage`), its mean
    gradient is that of `exact`. (With mu in the place of pi, stale tokens would pull to where q / mu is
    largest.)

    Source: Lu 2025, "On-Policy Distillation" (Thinking Machines Lab); the exact divergence: Gu et al. 2023
    (MiniLLM, arXiv 2306.08543), Agarwal et al. 2023 (GKD, arXiv 2306.13649).
    """

    def __init__(self, frozen: FrozenPolicy | ServedPolicy, ranks: Ranks, config: TeacherConfig) -> None:
        self.model = frozen.policy
        self.needs_start = config.form == "sampled"
        self._frozen = frozen
        self._ranks = ranks
        self._config = config

    def begin(self, minis: Sequence[MiniBatch], flat: FlatBatch, tokens: TokenBatch, step: int) -> FlatBatch:
        self._sums = torch.zeros(2, dtype=torch.float64)
        if self._config.form == "sampled":
            logprobs = self._frozen.logprobs(minis, tokens)
            gap = k1_penalty(tokens.start_logprobs, logprobs, tokens.mask)
            self.advantages = self._config.kl_coef * teachers_advantage(gap, tokens.mask)
            if self._ranks.rank == 0:  # every rank has seen the whole batch
                self._count(gap, tokens.mask)
        return flat

    def reading(self, micro: MicroBatch) -> Reading | None:
        if self._config.form == "sampled" or self.model is None:
            return None
        with torch.no_grad():
            return DivergenceFrom(self.model.predicting_states(micro), self.model.fused_head)

    def loss(self, at: Tensor, seen: PolicyTokens, read: Tensor | None) -> Tensor | None:
        if read is None:
            return None
        self._count(read.detach(), seen.mask)
        return self._config.kl_coef * torch.where(seen.mask, read, 0.0)

    def metrics(self) -> dict[str, float]:
        total, tokens = self._ranks.sum_on_host(self._sums.clone()).tolist()
        return {"teacher/kl": total / max(tokens, 1.0)}

    def _count(self, divergences: Tensor, mask: Tensor) -> None:
        kept = divergences[mask].double()
        self._sums += torch.tensor([float(kept.sum()), len(kept)], dtype=torch.float64)


def load_teacher(config: Config, ranks: Ranks, base: FrozenPolicy | None) -> Teacher:
    """`teacher.path`, loaded, or the one behind `teacher.endpoint`. Raises `ModelError`."""
    section = config.teacher
    assert section is not None
    if section.endpoint is not None:
        from asyncrl.trainer.lessons.served import ServedPolicy

        return Teacher(ServedPolicy(section, ranks), ranks, section)
    frozen = load_frozen(config, "teacher.path", section.path, ranks, base, offload=section.offload)
    return Teacher(frozen, ranks, section)
