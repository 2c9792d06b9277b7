"""The policy's part of a training step: log-probabilities of a batch, and updates by the objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from asyncrl.config import ObjectiveConfig
from asyncrl.objective.diagnostics import Diagnostics
from asyncrl.objective.make import make_policy_objective
from asyncrl.objective.normalise import aggregate
from asyncrl.objective.policy import PolicyTokens
from asyncrl.objective.proximal import WITHOUT_PASS
from asyncrl.objective.step_size import sequence_sums, vcpo_lr_scale
from asyncrl.trainer.learner import Learner, Update
from asyncrl.trainer.models.ewma import AveragedPolicy
from asyncrl.trainer.models.reference import Reference
from asyncrl.trainer.packing.batch import TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch, batch_logprobs, count_micros
from asyncrl.trainer.ranks import Ranks, gathered_on_host
from asyncrl.work import did_one, working


class PolicyUpdate:
    """Updates the policy by `objective`, once a mini-batch.

    ages: how many ages of tokens there are. averaged: the proximal policy of `objective.proximal: ewma`.
    """

    def __init__(
        self,
        policy: Learner,
        ranks: Ranks,
        config: ObjectiveConfig,
        *,
        ages: int,
        reference: Reference | None = None,
        averaged: AveragedPolicy | None = None,
    ) -> None:
        self.policy = policy
        self._ranks = ranks
        self._config = config
        self._ages = ages
        self._reference = reference
        self._averaged = averaged
        chosen = make_policy_objective(config.policy_loss, config.settings_of(config.policy_loss))
        self._loss, self._batch_mask = chosen.loss, chosen.batch_mask
        self._aggregation = config.aggregation or chosen.aggregation

    def needs_start(self, updates: int) -> bool:
        """Whether so many updates must know of the whole batch what the policy was before the first."""
        return (
            (self._config.proximal == "recompute" and updates > 1)
            or self._batch_mask is not None
            or self._config.step_size == "vcpo"
        )

    def logprobs(self, minis: Sequence[MiniBatch], ids: Tensor) -> Tensor:
        """float32[T]: of every trained token of the batch (ids: int64[T]) under the policy, 0 elsewhere."""
        return batch_logprobs(self.policy, minis, ids, self._ranks)

    def prox_logprobs(self, minis: Sequence[MiniBatch], ids: Tensor, start: Tensor | None) -> Tensor | None:
        """`TokenBatch.prox_logprobs`, given `start_logprobs`."""
        if self._averaged is not None:
            return batch_logprobs(self._averaged.average, minis, ids, self._ranks)
        return start if self._config.proximal == "recompute" else None

    def train(
        self, minis: Sequence[MiniBatch], tokens: TokenBatch, advantages: Tensor, lr: float, step: int
    ) -> dict[str, float]:
        """One update a mini-batch; metrics of all. advantages: float32[T]."""
        if self._config.step_size == "vcpo":
            lr *= vcpo_lr_scale(sequence_sums(tokens.log_ratio, tokens.sequences, tokens.mask))
        kept = None
        if self._batch_mask is not None:
            kept = self._batch_mask(tokens.log_ratio, advantages, tokens.mask)
        diagnostics = Diagnostics(self._ages)
        losses, updates = [], []
        with working("micro-batches of the policy's updates", count_micros(minis)):
            for mini in minis:
                losses.append(self._accumulate_gradient(mini, tokens, advantages, kept, diagnostics))
                updates.append(self.policy.update(lr, step))
                if self._averaged is not None:
                    self._averaged.follow()
        return self._metrics(diagnostics, losses, updates, lr)

    def metrics_of_none(self) -> dict[str, float]:
        """The metrics of a step without an update."""
        return self._metrics(Diagnostics(self._ages), [], [], 0.0)

    def _accumulate_gradient(
        self,
        mini: MiniBatch,
        tokens: TokenBatch,
        advantages: Tensor,
        kept: Tensor | None,
        diagnostics: Diagnostics,
    ) -> float:
        """Add the gradient of the mini-batch's loss to the parameters, micro-batch by micro-batch; this
        rank's share of the loss."""
        loss = 0.0
        for micro in mini.micros():
            at = micro.token_index
            logprobs, entropy = self.policy(micro, tokens.ids[at])
            seen = PolicyTokens(
                logprobs=logprobs,
                prox_logprobs=self._proximal(tokens, at, logprobs.detach()),
                behavior_logprobs=tokens.behavior_logprobs[at],
                advantages=advantages[at],
                mask=tokens.mask[at],
                sequences=tokens.sequences[at],
                ages=tokens.ages[at],
                kept=None if kept is None else kept[at],
            )
            terms = self._loss(seen)
            of_tokens = terms.loss
            if self._config.entropy_coef:
                of_tokens = of_tokens - self._config.entropy_coef * entropy
            if self._reference is not None and not self._reference.in_reward:
                of_tokens = of_tokens + self._reference.loss(seen, tokens.ref_logprobs[at])
            share = aggregate(self._aggregation, of_tokens, seen.mask, seen.sequences, mini.totals)
            self.policy.backward(share)
            loss += float(share.detach())
            # Of the policy that the step starts from, where it is known: its own updates add no staleness.
            start = logprobs if tokens.start_logprobs is None else tokens.start_logprobs[at]
            diagnostics.add(seen.ages, start, seen.behavior_logprobs, terms.clipped, entropy, seen.mask)
            did_one()
        return loss

    def _proximal(self, tokens: TokenBatch, at: Tensor, logprobs: Tensor) -> Tensor:
        """float32[N]: log pi_prox of a micro-batch's tokens, which the policy gives `logprobs` now."""
        if tokens.prox_logprobs is not None:
            return tokens.prox_logprobs[at]
        without_pass = WITHOUT_PASS.get(self._config.proximal)
        if without_pass is None:
            return logprobs
        return without_pass(logprobs, tokens.behavior_logprobs[at], tokens.ages[at])

    def _metrics(
        self, diagnostics: Diagnostics, losses: Sequence[float], updates: Sequence[Update], lr: float
    ) -> dict[str, float]:
        """Over all ranks."""
        everything = Diagnostics(self._ages)
        for table in gathered_on_host(self._ranks, diagnostics.to_tensor().cpu()):
            everything.merge(table)
        shares = self._ranks.sum_on_host(torch.tensor(losses, dtype=torch.float64))
        return {
            **dict(everything.metrics()),
            "loss": _mean(shares.tolist()),
            "grad_norm": _mean([update.grad_norm for update in updates]),
            "skipped_updates": float(sum(not update.applied for update in updates)),
            "lr": lr,
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
