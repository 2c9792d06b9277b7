"""One training step: a batch of groups in, updated weights and metrics out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncrl.config import Config
from asyncrl.core.records import Batch
from asyncrl.objective.advantages import grpo
from asyncrl.objective.diagnostics import Diagnostics
from asyncrl.objective.normalise import token_mean
from asyncrl.objective.policy import PolicyTokens, make_policy_loss
from asyncrl.trainer.batch import FlatBatch, check_staleness, count_trained, flatten, split_groups
from asyncrl.trainer.metrics import batch_metrics
from asyncrl.trainer.optimizer import Update
from asyncrl.trainer.packing import MicroBatch, assemble, pack, row_capacity
from asyncrl.trainer.prefix import shared_units, single_units
from asyncrl.trainer.schedule import learning_rate


class Policy(Protocol):
    """The model as the step sees it (`asyncrl.trainer.model.Policy`)."""

    row_tokens: int
    """Shortest rows into which to pack."""
    shares_prefixes: bool
    """Whether sequences that begin alike may be computed together."""

    @property
    def device(self) -> torch.device: ...

    def token_logprobs(self, micro: MicroBatch, targets: Tensor) -> tuple[Tensor, Tensor]: ...


class Optimizer(Protocol):
    """Updates the policy's weights from the gradients summed so far
    (`asyncrl.trainer.optimizer.MasterAdamW`)."""

    def step(self, lr: float, training_step: int) -> Update: ...


@dataclass(frozen=True, slots=True)
class TokenTensors:
    """What the loss reads of a `FlatBatch`, on the policy's device: [T] each, at the token's own index.

    prox_logprobs: float32; None while the policy still is the proximal policy (a step's only update).
    """

    ids: Tensor
    ages: Tensor
    behavior_logprobs: Tensor
    advantages: Tensor
    prox_logprobs: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """The share of the batch that one optimizer update sees."""

    micros: list[MicroBatch]
    trained_tokens: int


class TrainStep:
    """Runs training steps on a policy and its optimizer, by the config's objective and batch sizes."""

    def __init__(self, policy: Policy, optimizer: Optimizer, config: Config) -> None:
        self._policy = policy
        self._optimizer = optimizer
        self._trainer = config.trainer
        self._objective = config.objective
        self._max_staleness = config.staleness.max_staleness
        self._total_steps = config.run.steps
        self._policy_loss = make_policy_loss(config.objective.policy_loss, config.objective.model_dump())

    def __call__(self, batch: Batch) -> dict[str, float]:
        """Advantages, proximal logprobs, then one optimizer update a mini-batch. Returns the step's
        metrics."""
        flat = flatten(batch)
        check_staleness(flat, self._max_staleness)
        advantages = grpo(
            torch.from_numpy(flat.rewards), torch.from_numpy(flat.group_ids), self._objective.scale_by_std
        )
        tokens = _token_tensors(flat, advantages, self._policy.device)
        minis = [self._mini_batch(flat, part) for part in split_groups(flat, self._trainer.mini_batches)]
        minis = [mini for mini in minis if mini.trained_tokens]
        if len(minis) > 1:
            tokens = replace(tokens, prox_logprobs=self._logprobs(minis, tokens))
        lr = self._learning_rate(batch.step)
        diagnostics = Diagnostics()
        losses, updates = [], []
        for mini in minis:
            losses.append(self._accumulate_gradient(mini, tokens, diagnostics))
            updates.append(self._optimizer.step(lr, batch.step))
        return {
            **dict(batch_metrics(batch, flat)),
            **dict(diagnostics.metrics()),
            "loss": _mean(losses),
            "grad_norm": _mean([update.grad_norm for update in updates]),
            "skipped_updates": float(sum(not update.applied for update in updates)),
            "lr": lr,
            "adv/zero_groups_frac": _zero_groups(flat, advantages),
        }

    def _mini_batch(self, flat: FlatBatch, sequences: NDArray[np.int64]) -> MiniBatch:
        lengths = np.zeros(flat.sequences, dtype=np.int64)
        lengths[sequences] = flat.trained_lengths()[sequences]
        budget, row_tokens = self._trainer.micro_batch_tokens, self._policy.row_tokens
        if self._policy.shares_prefixes:
            units = shared_units(flat, lengths, row_capacity(int(lengths.max()), budget, row_tokens))
        else:
            units = single_units(lengths)
        layouts = pack([unit.tokens for unit in units], budget, row_tokens)
        micros = [assemble(flat, lengths, units, layout).to(self._policy.device) for layout in layouts]
        return MiniBatch(micros, count_trained(flat, sequences))

    @torch.no_grad()
    def _logprobs(self, minis: Sequence[MiniBatch], tokens: TokenTensors) -> Tensor:
        """float32[T]: of all trained tokens under the policy as it is, 0 elsewhere. In the training pass's
        own packing, so that the first update's ratios are exactly 1."""
        logprobs = torch.zeros_like(tokens.behavior_logprobs)
        for mini in minis:
            for micro in mini.micros:
                at = micro.token_index
                logprobs[at] = self._policy.token_logprobs(micro, tokens.ids[at])[0]
        return logprobs

    def _accumulate_gradient(self, mini: MiniBatch, tokens: TokenTensors, diagnostics: Diagnostics) -> float:
        """Add the gradient of the mini-batch's loss to the parameters, micro-batch by micro-batch; the
        loss."""
        loss = 0.0
        for micro in mini.micros:
            at = micro.token_index
            logprobs, entropy = self._policy.token_logprobs(micro, tokens.ids[at])
            seen = PolicyTokens(
                logprobs=logprobs,
                prox_logprobs=logprobs.detach() if tokens.prox_logprobs is None else tokens.prox_logprobs[at],
                behavior_logprobs=tokens.behavior_logprobs[at],
                advantages=tokens.advantages[at],
                mask=torch.ones_like(at, dtype=torch.bool),
            )
            terms = self._policy_loss(seen)
            share = token_mean(terms.loss, seen.mask, mini.trained_tokens)
            if self._objective.entropy_coef:
                bonus = token_mean(entropy, seen.mask, mini.trained_tokens)
                share = share - self._objective.entropy_coef * bonus
            share.backward()
            loss += float(share.detach())
            # Of the policy that the step starts from: what its own updates add is no staleness.
            diagnostics.add(
                tokens.ages[at], seen.prox_logprobs, seen.behavior_logprobs, terms.clipped, entropy, seen.mask
            )
        return loss

    def _learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            peak=self._trainer.lr,
            schedule=self._trainer.lr_schedule,
            warmup_steps=self._trainer.warmup_steps,
            total_steps=self._total_steps,
            min_share=self._trainer.lr_min_share,
        )


def _token_tensors(flat: FlatBatch, advantages: Tensor, device: torch.device) -> TokenTensors:
    per_token = torch.repeat_interleave(advantages.float(), torch.from_numpy(np.diff(flat.offsets)))
    return TokenTensors(
        ids=torch.from_numpy(flat.token_ids).to(device),
        ages=torch.from_numpy(flat.ages).to(device),
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
