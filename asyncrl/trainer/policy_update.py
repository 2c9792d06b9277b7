"""The policy's part of a training step: log-probabilities of a batch, and updates by the objective."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from asyncrl.config import ObjectiveConfig
from asyncrl.objective.diagnostics import Diagnostics
from asyncrl.objective.make import make_policy_objective
from asyncrl.objective.normalise import aggregate
from asyncrl.objective.policy import PolicyTokens, log_ratio_penalty
from asyncrl.objective.proximal import WITHOUT_PASS
from asyncrl.objective.step_size import ess_share, ess_sums, sequence_sums, vcpo_lr_scale
from asyncrl.trainer.learner import Learner, Update
from asyncrl.trainer.lesson import Lesson
from asyncrl.trainer.packing.batch import TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch, batch_logprobs, count_micros, over_tokens
from asyncrl.trainer.packing.pack import MicroBatch
from asyncrl.trainer.ranks import Ranks, gathered_on_host
from asyncrl.work import did_one, working

if TYPE_CHECKING:
    from asyncrl.trainer.averaged import AveragedPolicy


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
        lessons: Sequence[Lesson] = (),
        averaged: AveragedPolicy | None = None,
    ) -> None:
        self.policy = policy
        self._ranks = ranks
        self._config = config
        self._ages = ages
        self._lessons = lessons
        self._averaged = averaged
        chosen = make_policy_objective(config.policy_loss, config.settings_of(config.policy_loss))
        self._loss, self._batch_mask = chosen.loss, chosen.batch_mask
        self._has_proximal = chosen.has_proximal
        self._aggregation = config.aggregation or chosen.aggregation

    def needs_start(self, updates: int) -> bool:
        """Whether so many updates must know of the whole batch what the policy was before the first."""
        return (
            self._has_proximal and self._config.proximal == "recompute" and updates > 1
        ) or self._config.step_size == "vcpo"

    def logprobs(self, minis: Sequence[MiniBatch], ids: Tensor) -> Tensor:
        """float32[T]: of every trained token of the batch (ids: int64[T]) under the policy, 0 elsewhere."""
        return batch_logprobs(self.policy, minis, ids, self._ranks)

    def prox_logprobs(self, start: Tensor | None) -> Tensor | None:
        """`TokenBatch.prox_logprobs`, given `start_logprobs`."""
        return start if self._config.proximal == "recompute" else None

    def train(
        self, minis: Sequence[MiniBatch], tokens: TokenBatch, advantages: Tensor, lr: float, step: int
    ) -> dict[str, float]:
        """One update a mini-batch; metrics of all. advantages: float32[T]."""
        if self._config.step_size == "vcpo":
            sums = sequence_sums(tokens.log_ratio, tokens.sequences, tokens.mask)
            lr *= vcpo_lr_scale(sums, ess_base=self._config.ess_base)
        seen = _Seen(Diagnostics(self._ages))
        updates = []
        with working("micro-batches of the policy's updates", count_micros(minis)):
            for mini in minis:
                of_mini = self._of_uncertain(mini, tokens, advantages)
                kept = self._kept(mini, tokens, of_mini)
                self._accumulate_gradient(mini, tokens, of_mini, kept, seen)
                for lesson in self._lessons:
                    lesson.add_gradient(mini)
                updates.append(self.policy.update(lr, step))
                if self._averaged is not None:
                    self._averaged.follow()
        return self._metrics(seen, updates, lr)

    def metrics_of_none(self) -> dict[str, float]:
        """The metrics of a step without an update."""
        return self._metrics(_Seen(Diagnostics(self._ages)), [], 0.0)

    def _kept(self, mini: MiniBatch, tokens: TokenBatch, advantages: Tensor) -> Tensor | None:
        """bool[T]: the objective's `batch_mask` of the mini-batch, by the policy as it is before its update;
        None for an objective that has none."""
        if self._batch_mask is None:
            return None
        now = self.logprobs([mini], tokens.ids)
        everywhere = torch.arange(len(now), device=now.device)
        inside = self._inside(mini, len(now))
        return self._batch_mask(_policy_tokens(tokens, everywhere, now, now, advantages, inside))

    def _inside(self, mini: MiniBatch, tokens: int) -> Tensor:
        """bool[T]: the mini-batch's tokens. Every rank sees all of them, so that all decide alike."""
        return over_tokens([mini], tokens, self._ranks, lambda micro: torch.ones_like(micro.token_index)) > 0

    def _of_uncertain(self, mini: MiniBatch, tokens: TokenBatch, advantages: Tensor) -> Tensor:
        """advantages (float32[T]), 0 for all of the mini-batch's tokens that are not uncertain enough."""
        share = self._config.entropy_share
        if share is None:
            return advantages
        from asyncrl.objective.rejection import most_uncertain  # which few runs need

        def entropies(micro: MicroBatch) -> Tensor:
            return self.policy(micro, tokens.ids[micro.token_index])[1]

        entropy = over_tokens([mini], len(advantages), self._ranks, entropies)
        uncertain = most_uncertain(entropy, self._inside(mini, len(entropy)), share)
        return torch.where(uncertain, advantages, 0.0)

    def _accumulate_gradient(
        self,
        mini: MiniBatch,
        tokens: TokenBatch,
        advantages: Tensor,
        kept: Tensor | None,
        seen: _Seen,
    ) -> None:
        """Add the gradient of the mini-batch's loss to the parameters, micro-batch by micro-batch, and what
        this rank has computed to `seen`."""
        loss = 0.0
        for micro in mini.micros():
            at = micro.token_index
            readings = [lesson.reading(micro) for lesson in self._lessons]
            logprobs, entropy, *read = self.policy(micro, tokens.ids[at], *readings)
            prox = self._proximal(micro, tokens, logprobs.detach())
            here = _policy_tokens(tokens, at, logprobs, prox, advantages, kept=kept, entropies=entropy)
            of_tokens, clipped = self._token_losses(here)
            for lesson, of_lesson in zip(self._lessons, read, strict=True):
                if (further := lesson.loss(at, here, of_lesson)) is not None:
                    of_tokens = of_tokens + further
            share = aggregate(self._aggregation, of_tokens, here.mask, here.sequences, mini.totals)
            self.policy.backward(share)
            loss += float(share.detach())
            # Of the policy that the step starts from, where it is known: its own updates add no staleness.
            start = logprobs.detach() if tokens.start_logprobs is None else tokens.start_logprobs[at]
            seen.diagnostics.add(here.ages, start, here.behavior_logprobs, clipped, entropy, here.mask)
            counted = here.mask & start.isfinite()
            of_sequences = sequence_sums(start - here.behavior_logprobs, here.sequences, counted)
            seen.ess_sums.append(ess_sums(of_sequences))
            seen.impossible_tokens += int((tokens.mask[at] & ~here.mask).sum())
            did_one()
        seen.losses.append(loss)

    def _token_losses(self, tokens: PolicyTokens) -> tuple[Tensor, Tensor]:
        """(losses: float32[N], without gradient: bool[N]) by the objective, less what is rejected."""
        config, (loss, clipped) = self._config, self._loss(tokens)
        if config.reject is not None:
            from asyncrl.objective.rejection import rejected  # which few runs need

            lost = rejected(
                tokens, config.reject, config.reject_above, config.reject_below, config.reject_only_negative
            )
            loss, clipped = torch.where(lost, 0.0, loss), clipped | lost
        if config.log_ratio_coef:
            loss = loss + config.log_ratio_coef * log_ratio_penalty(tokens)
        return loss, clipped

    def _proximal(self, micro: MicroBatch, tokens: TokenBatch, logprobs: Tensor) -> Tensor:
        """float32[N]: log pi_prox of a micro-batch's tokens, which the policy gives `logprobs` now."""
        at = micro.token_index
        if self._averaged is not None:
            with torch.no_grad():
                return self._averaged.average(micro, tokens.ids[at])[0]
        if tokens.prox_logprobs is not None:
            return tokens.prox_logprobs[at]
        without_pass = WITHOUT_PASS.get(self._config.proximal)
        if without_pass is None:
            return logprobs
        return without_pass(logprobs, tokens.behavior_logprobs[at], tokens.ages[at])

    def _metrics(self, seen: _Seen, updates: Sequence[Update], lr: float) -> dict[str, float]:
        """Over all ranks."""
        everything = Diagnostics(self._ages)
        for table in gathered_on_host(self._ranks, seen.diagnostics.to_tensor().cpu()):
            everything.merge(table)
        sums = torch.tensor([*seen.losses, seen.impossible_tokens], dtype=torch.float64)
        *losses, impossible = self._ranks.sum_on_host(sums).tolist()
        ess = torch.stack([ess_sums(torch.zeros(0)), *(part.cpu() for part in seen.ess_sums)]).logsumexp(0)
        return {
            **dict(everything.metrics()),
            "ess/sequence": ess_share(gathered_on_host(self._ranks, ess)),
            "impossible_tokens": impossible,
            "loss": _mean(losses),
            "grad_norm": _mean([update.grad_norm for update in updates]),
            "skipped_updates": float(sum(not update.applied for update in updates)),
            "lr": lr,
        }


@dataclass(slots=True)
class _Seen:
    """What this rank computes in a step. losses: its shares, by mini-batch. ess_sums: `ess_sums` of its
    micro-batches' sequences. impossible_tokens: trained tokens that the policy gives no probability."""

    diagnostics: Diagnostics
    losses: list[float] = field(default_factory=list)
    ess_sums: list[Tensor] = field(default_factory=list)
    impossible_tokens: int = 0


def _policy_tokens(
    tokens: TokenBatch,
    at: Tensor,
    logprobs: Tensor,
    prox: Tensor,
    advantages: Tensor,
    inside: Tensor | None = None,
    *,
    kept: Tensor | None = None,
    entropies: Tensor | None = None,
) -> PolicyTokens:
    """The batch's tokens `at` (int64[N]) with log pi_theta and log pi_prox, float32[N] each. advantages and
    kept are the batch's; inside: bool[N], where the mask applies, None for everywhere.

    A token of probability 0 is masked: its ratio is 0 and so is its gradient, but log 0 makes NaNs. It stays
    in the denominator of the mean."""
    mask = tokens.mask[at] & ~logprobs.detach().isneginf()
    return PolicyTokens(
        logprobs=logprobs,
        prox_logprobs=prox,
        behavior_logprobs=tokens.behavior_logprobs[at],
        advantages=advantages[at],
        mask=mask if inside is None else mask & inside,
        sequences=tokens.sequences[at],
        ages=tokens.ages[at],
        kept=None if kept is None else kept[at],
        entropies=entropies,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
