"""One training step: a batch of groups in, updated weights and metrics out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.objective.advantages import Outcomes
from asyncrl.objective.diagnostics import Diagnostics
from asyncrl.objective.make import make_group_advantage, make_policy_objective
from asyncrl.objective.normalise import Totals, aggregate
from asyncrl.objective.policy import PolicyTokens
from asyncrl.trainer.batch import FlatBatch, check_staleness, count_trained, flatten, split_groups
from asyncrl.trainer.learner import Learner
from asyncrl.trainer.metrics import batch_metrics
from asyncrl.trainer.ranks import OneRank, Ranks
from asyncrl.trainer.schedule import learning_rate
from asyncrl.trainer.shares import MiniBatch, Packing, mini_batch


@dataclass(frozen=True, slots=True)
class TokenTensors:
    """What the loss reads of a `FlatBatch`, on the policy's device: [T] each, at the token's own index.

    prox_logprobs: float32; None while the policy still is the proximal policy (a step's only update).
    kept: bool; None when the objective leaves no token of the batch out.
    """

    ids: Tensor
    ages: Tensor
    sequences: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    trained: Tensor
    prox_logprobs: Tensor | None = None
    kept: Tensor | None = None


class TrainStep:
    """Runs training steps on a policy, by the config's objective and batch sizes."""

    def __init__(self, policy: Learner, packing: Packing, config: Config, ranks: Ranks | None = None) -> None:
        self._policy = policy
        self._packing = packing
        self._ranks = ranks or OneRank()
        self._trainer = config.trainer
        self._objective = config.objective
        self._max_staleness = config.staleness.max_staleness
        self._total_steps = config.run.steps
        self._max_length = config.rollout.max_new_tokens
        chosen = config.objective
        self._advantage = make_group_advantage(chosen.advantage, chosen.settings_of(chosen.advantage))
        objective = make_policy_objective(chosen.policy_loss, chosen.settings_of(chosen.policy_loss))
        self._policy_loss, self._batch_mask = objective.loss, objective.batch_mask
        self._aggregation = chosen.aggregation or objective.aggregation

    def __call__(self, batch: Batch, total_steps: int | None = None) -> dict[str, float]:
        """Train on a batch of records; the step's metrics. total_steps: as for `Trainer.step`."""
        flat = flatten(batch)
        return dict(batch_metrics(batch, flat)) | self.train(flat, batch.step, total_steps)

    def train(self, flat: FlatBatch, step: int, total_steps: int | None = None) -> dict[str, float]:
        """Advantages, proximal logprobs, then one optimizer update a mini-batch. Every rank gives the whole
        batch; returns the metrics of the whole batch, the same on all ranks."""
        check_staleness(flat, self._max_staleness)
        advantages = self._advantage(_outcomes(flat))
        tokens = _token_tensors(flat, advantages, self._packing.device)
        parts = [part for part in split_groups(flat, self._trainer.mini_batches) if count_trained(flat, part)]
        minis = [mini_batch(flat, part, self._packing, self._ranks) for part in parts]
        if len(minis) > 1 or self._batch_mask is not None:
            tokens = replace(tokens, prox_logprobs=self._logprobs(minis, tokens))
        if self._batch_mask is not None and tokens.prox_logprobs is not None:
            log_ratio = tokens.prox_logprobs - tokens.behavior_logprobs
            tokens = replace(tokens, kept=self._batch_mask(log_ratio, tokens.advantages, tokens.trained))
        lr = self._learning_rate(step, total_steps or self._total_steps)
        diagnostics = Diagnostics()
        losses, updates = [], []
        for mini in minis:
            losses.append(self._accumulate_gradient(mini, tokens, diagnostics))
            updates.append(self._policy.update(lr, step))
        return {
            **dict(diagnostics.metrics()),
            "loss": _mean(self._ranks.sum(torch.tensor(losses, dtype=torch.float64)).tolist()),
            "grad_norm": _mean([update.grad_norm for update in updates]),
            "skipped_updates": float(sum(not update.applied for update in updates)),
            "lr": lr,
            "adv/zero_groups_frac": _zero_groups(flat, advantages),
        }

    @torch.no_grad()
    def _logprobs(self, minis: Sequence[MiniBatch], tokens: TokenTensors) -> Tensor:
        """float32[T]: of all trained tokens under the policy as it is, 0 elsewhere. In the training pass's
        own packing, so that the first update's ratios are exactly 1."""
        logprobs = torch.zeros_like(tokens.behavior_logprobs)
        for mini in minis:
            for micro in mini.micros:
                at = micro.token_index
                logprobs[at] = self._policy(micro, tokens.ids[at])[0]
        return self._ranks.sum(logprobs)

    def _accumulate_gradient(self, mini: MiniBatch, tokens: TokenTensors, diagnostics: Diagnostics) -> float:
        """Add the gradient of the mini-batch's loss to the parameters, micro-batch by micro-batch; this
        rank's share of the loss."""
        loss = 0.0
        totals = Totals(mini.trained_tokens, mini.trained_sequences, self._max_length)
        for micro in mini.micros:
            at = micro.token_index
            logprobs, entropy = self._policy(micro, tokens.ids[at])
            seen = PolicyTokens(
                logprobs=logprobs,
                prox_logprobs=logprobs.detach() if tokens.prox_logprobs is None else tokens.prox_logprobs[at],
                behavior_logprobs=tokens.behavior_logprobs[at],
                advantages=tokens.advantages[at],
                mask=tokens.trained[at],
                sequences=tokens.sequences[at],
                ages=tokens.ages[at],
                kept=None if tokens.kept is None else tokens.kept[at],
            )
            terms = self._policy_loss(seen)
            loss_of_tokens = terms.loss
            if self._objective.entropy_coef:
                loss_of_tokens = loss_of_tokens - self._objective.entropy_coef * entropy
            share = aggregate(self._aggregation, loss_of_tokens, seen.mask, seen.sequences, totals)
            self._policy.backward(share)
            loss += float(share.detach())
            # Of the policy that the step starts from: what its own updates add is no staleness.
            diagnostics.add(
                tokens.ages[at], seen.prox_logprobs, seen.behavior_logprobs, terms.clipped, entropy, seen.mask
            )
        return loss

    def _learning_rate(self, step: int, total_steps: int) -> float:
        return learning_rate(
            step,
            peak=self._trainer.lr,
            schedule=self._trainer.lr_schedule,
            warmup_steps=self._trainer.warmup_steps,
            total_steps=total_steps,
            min_share=self._trainer.lr_min_share,
        )


def _outcomes(flat: FlatBatch) -> Outcomes:
    trained = np.add.reduceat(flat.loss_mask, flat.offsets[:-1], dtype=np.int64)
    return Outcomes(*(torch.from_numpy(a) for a in (flat.rewards, flat.group_ids, trained)))


def _token_tensors(flat: FlatBatch, advantages: Tensor, device: torch.device) -> TokenTensors:
    per_token = torch.repeat_interleave(advantages.float(), torch.from_numpy(np.diff(flat.offsets)))
    return TokenTensors(
        ids=torch.from_numpy(flat.token_ids).to(device),
        ages=torch.from_numpy(flat.ages).to(device),
        sequences=torch.from_numpy(np.repeat(np.arange(flat.sequences), np.diff(flat.offsets))).to(device),
        trained=torch.from_numpy(flat.loss_mask).to(device),
        behavior_logprobs=torch.from_numpy(flat.behavior_logprobs).to(device),
        advantages=per_token.to(device),
    )


def _zero_groups(flat: FlatBatch, advantages: Tensor) -> float:
    """Share of the groups in which no trajectory has an advantage."""
    groups = np.unique(flat.group_ids)
    with_signal = np.unique(flat.group_ids[advantages.numpy() != 0])
    return 1.0 - len(with_signal) / len(groups)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
