"""One training step: a batch of groups in, updated weights and metrics out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.objective.diagnostics import Diagnostics
from asyncrl.objective.kl import k1_penalty, kl_loss
from asyncrl.objective.make import make_policy_objective
from asyncrl.objective.normalise import aggregate
from asyncrl.objective.policy import PolicyTokens
from asyncrl.objective.proximal import WITHOUT_PASS
from asyncrl.objective.step_size import sequence_sums, vcpo_lr_scale
from asyncrl.trainer.credit import Assigned, Credit, Evidence
from asyncrl.trainer.critic_step import CriticStep
from asyncrl.trainer.learner import Learner
from asyncrl.trainer.metrics import batch_metrics
from asyncrl.trainer.models.ewma import AveragedPolicy
from asyncrl.trainer.models.policy import Policy
from asyncrl.trainer.models.reference import Reference
from asyncrl.trainer.packing.batch import FlatBatch, check_staleness, count_trained, flatten, split_groups
from asyncrl.trainer.packing.shares import MiniBatch, Packing, micro_batches, mini_batch
from asyncrl.trainer.passes import over_tokens
from asyncrl.trainer.ranks import OneRank, Ranks, gathered_on_host
from asyncrl.trainer.schedule import learning_rate
from asyncrl.work import did_one, working


@dataclass(frozen=True, slots=True)
class Tokens:
    """The batch's T tokens on the policy's device, [T] each: int64, but `trained` (bool) and
    `behavior_logprobs` (float32)."""

    ids: Tensor
    ages: Tensor
    sequences: Tensor
    trained: Tensor
    behavior_logprobs: Tensor

    @classmethod
    def of(cls, flat: FlatBatch, device: torch.device) -> Self:
        arrays = (flat.token_ids, flat.ages, flat.sequence_index().numpy(), flat.loss_mask)
        ids, ages, sequences, trained = (torch.from_numpy(array).to(device) for array in arrays)
        return cls(ids, ages, sequences, trained, torch.from_numpy(flat.behavior_logprobs).to(device))


@dataclass(frozen=True, slots=True)
class Lessons:
    """What the batch's tokens are to teach: float32[T] each.

    start_logprobs: under the policy that the step starts from; None where no pass has computed them.
    prox_logprobs: under the proximal policy; None where it is the policy itself (a step's only update), or
    made of what the token brings along. kept: bool[T]; None when the objective leaves no token of the batch
    out. reference_logprobs: None without a KL in the loss.
    """

    advantages: Tensor
    start_logprobs: Tensor | None = None
    prox_logprobs: Tensor | None = None
    kept: Tensor | None = None
    reference_logprobs: Tensor | None = None


class TrainStep:
    """Runs training steps on a policy, and on a critic where there is one, by the config's objective and
    batch sizes."""

    def __init__(
        self,
        policy: Learner,
        packing: Packing,
        config: Config,
        ranks: Ranks | None = None,
        *,
        critic: Learner | None = None,
        reference: Reference | None = None,
        averaged: AveragedPolicy | None = None,
    ) -> None:
        self._policy = policy
        self._packing = packing
        self._ranks = ranks or OneRank(packing.device)
        self._critic = None if critic is None else CriticStep(critic, config, self._ranks)
        self._reference = reference
        self._averaged = averaged
        self._config = config
        chosen = config.objective
        self._credit = Credit(config)
        objective = make_policy_objective(chosen.policy_loss, chosen.settings_of(chosen.policy_loss))
        self._policy_loss, self._batch_mask = objective.loss, objective.batch_mask
        self._aggregation = chosen.aggregation or objective.aggregation

    def __call__(self, batch: Batch, total_steps: int | None = None) -> dict[str, float]:
        """Train on a batch of records; the step's metrics. total_steps: as for `Trainer.step`."""
        flat = flatten(batch)
        return dict(batch_metrics(batch, flat)) | self.train(flat, batch.step, total_steps)

    def train(self, flat: FlatBatch, step: int, total_steps: int | None = None) -> dict[str, float]:
        """Advantages and proximal logprobs, then one optimizer update a mini-batch. Every rank gives the
        whole batch; returns the metrics of the whole batch, the same on all ranks.

        Random numbers that an objective draws from torch are a function of run.seed and the step, the same
        on all ranks: a run that goes on from a checkpoint draws the same, and there is no state of a
        generator to save."""
        torch.manual_seed(_seed(self._config.run.seed, step))
        trainer, total_steps = self._config.trainer, total_steps or self._config.run.steps
        check_staleness(flat, self._config.staleness.max_staleness)
        tokens = Tokens.of(flat, self._packing.device)
        parts = [part for part in split_groups(flat, trainer.mini_batches) if count_trained(flat, part)]
        max_length = self._config.rollout.max_new_tokens
        minis = [mini_batch(flat, part, self._packing, self._ranks, max_length) for part in parts]
        if not minis:  # all that was sampled is too old
            return self._train_policy(
                [], tokens, Lessons(torch.zeros_like(tokens.behavior_logprobs)), 0.0, step
            )
        lessons, assigned, evidence = self._prepare(flat, minis, tokens)
        metrics = _credit_metrics(flat, assigned)
        lr = self._learning_rate(trainer.lr, step, total_steps)
        if self._config.objective.step_size == "vcpo":
            assert evidence.log_ratio is not None
            units = sequence_sums(evidence.log_ratio, tokens.sequences, tokens.trained)
            lr *= vcpo_lr_scale(units)
        if self._critic is not None:
            assert self._config.critic is not None
            if step < self._config.critic.warmup_steps:
                lr = 0.0
            critic_lr = self._learning_rate(self._config.critic.lr, step, total_steps)
            metrics |= self._critic.train(minis, evidence.values, assigned.targets, critic_lr, step)
        return metrics | self._train_policy(minis, tokens, lessons, lr, step)

    def _prepare(
        self, flat: FlatBatch, minis: Sequence[MiniBatch], tokens: Tokens
    ) -> tuple[Lessons, Assigned, Evidence]:
        """What is computed of the whole batch before any update."""
        size = len(tokens.ids)

        def logprobs_of(policy: Learner | Policy) -> Tensor:
            return over_tokens(
                minis, size, self._ranks, lambda micro: policy(micro, tokens.ids[micro.token_index])[0]
            )

        start = logprobs_of(self._policy) if self._needs_start(len(minis)) else None
        prox = {"recompute": start, "ewma": self._averaged and logprobs_of(self._averaged.average)}.get(
            self._config.objective.proximal
        )
        log_ratio = None
        if start is not None:
            log_ratio = torch.where(tokens.trained, start - tokens.behavior_logprobs, 0.0)
        reference = None if self._reference is None else self._reference.logprobs(minis, tokens.ids)
        token_rewards = None
        if self._penalised:
            penalty = k1_penalty(start, reference, tokens.trained)
            token_rewards = -self._config.reference.kl_coef * penalty
        values = self._critic.values(minis, size) if self._critic is not None else None
        evidence = Evidence(values, log_ratio, token_rewards)
        assigned = self._credit.assign(flat, evidence, self._packing.device)
        kept = None
        if self._batch_mask is not None:
            kept = self._batch_mask(log_ratio, assigned.advantages, tokens.trained)
        return Lessons(assigned.advantages, start, prox, kept, reference), assigned, evidence

    @property
    def _penalised(self) -> bool:
        """Whether a KL to the reference is taken off the rewards."""
        return self._config.reference is not None and self._config.reference.where == "reward"

    def _needs_start(self, updates: int) -> bool:
        """Whether the step must know what the policy is before its first update, of the whole batch."""
        chosen = self._config.objective
        return (
            (chosen.proximal == "recompute" and updates > 1)
            or self._batch_mask is not None
            or self._credit.needs_ratios
            or self._penalised
            or chosen.step_size == "vcpo"
        )

    def _train_policy(
        self, minis: Sequence[MiniBatch], tokens: Tokens, lessons: Lessons, lr: float, step: int
    ) -> dict[str, float]:
        ages = self._config.staleness.max_staleness + 1
        diagnostics, everything = Diagnostics(ages), Diagnostics(ages)
        losses, updates = [], []
        with working("micro-batches of the policy's updates", micro_batches(minis)):
            for mini in minis:
                losses.append(self._accumulate_gradient(mini, tokens, lessons, diagnostics))
                updates.append(self._policy.update(lr, step))
                if self._averaged is not None:
                    self._averaged.follow()
        for table in gathered_on_host(self._ranks, diagnostics.to_tensor().cpu()):
            everything.merge(table)
        shares = torch.tensor(losses, dtype=torch.float64)
        return {
            **dict(everything.metrics()),
            "loss": _mean(self._ranks.sum_on_host(shares).tolist()),
            "grad_norm": _mean([update.grad_norm for update in updates]),
            "skipped_updates": float(sum(not update.applied for update in updates)),
            "lr": lr,
        }

    def _accumulate_gradient(
        self, mini: MiniBatch, tokens: Tokens, lessons: Lessons, diagnostics: Diagnostics
    ) -> float:
        """Add the gradient of the mini-batch's loss to the parameters, micro-batch by micro-batch; this
        rank's share of the loss."""
        loss = 0.0
        for micro in mini.micros:
            at = micro.token_index
            logprobs, entropy = self._policy(micro, tokens.ids[at])
            mu, ages = tokens.behavior_logprobs[at], tokens.ages[at]
            seen = PolicyTokens(
                logprobs=logprobs,
                prox_logprobs=self._proximal(lessons, at, logprobs.detach(), mu, ages),
                behavior_logprobs=mu,
                advantages=lessons.advantages[at],
                mask=tokens.trained[at],
                sequences=tokens.sequences[at],
                ages=ages,
                kept=None if lessons.kept is None else lessons.kept[at],
            )
            terms = self._policy_loss(seen)
            of_tokens = terms.loss
            if self._config.objective.entropy_coef:
                of_tokens = of_tokens - self._config.objective.entropy_coef * entropy
            if self._config.reference is not None and not self._penalised:
                chosen, ref = self._config.reference, lessons.reference_logprobs[at]
                of_tokens = of_tokens + chosen.kl_coef * kl_loss(
                    chosen.estimator, logprobs, ref, mu, seen.mask
                )
            share = aggregate(self._aggregation, of_tokens, seen.mask, seen.sequences, mini.totals)
            self._policy.backward(share)
            loss += float(share.detach())
            # Of the policy that the step starts from, where it is known: its own updates add no staleness.
            start = logprobs if lessons.start_logprobs is None else lessons.start_logprobs[at]
            diagnostics.add(ages, start, mu, terms.clipped, entropy, seen.mask)
            did_one()
        return loss

    def _proximal(
        self, lessons: Lessons, at: Tensor, logprobs: Tensor, behavior_logprobs: Tensor, ages: Tensor
    ) -> Tensor:
        """float32[N]: log pi_prox of a micro-batch's tokens."""
        if lessons.prox_logprobs is not None:
            return lessons.prox_logprobs[at]
        without_pass = WITHOUT_PASS.get(self._config.objective.proximal)
        return logprobs if without_pass is None else without_pass(logprobs, behavior_logprobs, ages)

    def _learning_rate(self, peak: float, step: int, total_steps: int) -> float:
        trainer = self._config.trainer
        return learning_rate(
            step,
            peak=peak,
            schedule=trainer.lr_schedule,
            warmup_steps=trainer.warmup_steps,
            total_steps=total_steps,
            min_share=trainer.lr_min_share,
        )


def _credit_metrics(flat: FlatBatch, assigned: Assigned) -> dict[str, float]:
    """Over the trained tokens; `adv/zero_groups_frac` is the share of the groups that teach nothing."""
    trained = torch.from_numpy(flat.loss_mask)
    advantages = assigned.advantages.cpu()[trained].double()
    with_signal = flat.group_ids[flat.sequence_index()[trained][advantages != 0].unique().numpy()]
    metrics = {
        "adv/zero_groups_frac": 1.0 - len(np.unique(with_signal)) / len(np.unique(flat.group_ids)),
        "adv/mean": float(advantages.mean()),
        "adv/std": float(advantages.std(correction=0)),
    }
    if assigned.targets is not None:
        metrics["critic/target_mean"] = float(assigned.targets.cpu()[trained].mean())
    return metrics


def _seed(run_seed: int, step: int) -> int:
    """64 bits that look random, different for every run and step."""
    return int(np.random.SeedSequence((run_seed, step)).generate_state(1, np.uint64)[0])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
