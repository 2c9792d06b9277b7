"""Bradley-Terry training of a sequence-classification model on tokenised pairs."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from asyncrl.errors import AsyncRLError
from asyncrl.reward.model import pooled_logits
from asyncrl.reward.train.pairs import TokenisedPair

WARMUP_SHARE = 0.05
"""Share of the steps in which the learning rate rises; then it falls linearly to `FINAL_LR_SHARE`."""
FINAL_LR_SHARE = 0.1
MAX_GRAD_NORM = 1.0
BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How to train. `batch_tokens`: tokens in one forward pass, padding included."""

    steps: int
    batch_size: int
    batch_tokens: int
    lr: float
    seed: int


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """Progress of the training, with an evaluation on the held-out pairs."""

    step: int
    epoch: float
    """Passes over the training pairs."""
    train_loss: float
    """Mean over the steps since the last report."""
    accuracy: float
    """Share of the held-out pairs whose chosen response has the higher score."""
    margin: float
    """Mean score of the chosen response minus that of the rejected one, over the held-out pairs."""


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """float[N]: -log sigmoid(r_chosen - r_rejected) for N pairs of scores (Ouyang et al. 2022, arXiv
    2203.02155, equation 1)."""
    return -F.logsigmoid(chosen - rejected)


def train(
    model: PreTrainedModel,
    pairs: Sequence[TokenisedPair],
    held_out: Sequence[TokenisedPair],
    schedule: Schedule,
    *,
    compute_dtype: torch.dtype = torch.float32,
) -> Iterator[TrainingReport]:
    """Train `model`, with float32 weights, in place; yield a report after every epoch and after the last
    step.

    The gradient does not depend on `batch_tokens`. Raises `AsyncRLError` if the loss is not finite.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.lr, betas=BETAS, weight_decay=0.0)
    lr_share = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_share(step, schedule.steps))
    losses: list[float] = []
    batches = _batches(len(pairs), schedule)
    steps_per_epoch = -(-len(pairs) // schedule.batch_size)
    for step in range(1, schedule.steps + 1):
        batch = [pairs[i] for i in next(batches)]
        model.train()
        loss = 0.0
        for micro in _micro_batches(batch, schedule.batch_tokens):
            chosen, rejected = _scores(model, micro, compute_dtype)
            share = bradley_terry_loss(chosen, rejected).sum() / len(batch)
            share.backward()
            loss += float(share.detach())
        if not math.isfinite(loss):
            raise AsyncRLError(f"the loss is {loss} at step {step}: use a lower --lr, or --dtype float32")
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        lr_share.step()
        losses.append(loss)
        if step % steps_per_epoch == 0 or step == schedule.steps:
            accuracy, margin = judge(model, held_out, schedule.batch_tokens, compute_dtype)
            yield TrainingReport(step, step / steps_per_epoch, sum(losses) / len(losses), accuracy, margin)
            losses.clear()


@torch.no_grad()
def judge(
    model: PreTrainedModel, pairs: Sequence[TokenisedPair], batch_tokens: int, compute_dtype: torch.dtype
) -> tuple[float, float]:
    """(accuracy, margin) over the pairs; NaN if there are none."""
    model.eval()
    differences = [
        chosen - rejected
        for micro in _micro_batches(pairs, batch_tokens)
        for chosen, rejected in [_scores(model, micro, compute_dtype)]
    ]
    if not differences:
        return float("nan"), float("nan")
    difference = torch.cat(differences)
    return float((difference > 0).float().mean()), float(difference.mean())


def _scores(
    model: PreTrainedModel, pairs: Sequence[TokenisedPair], compute_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(chosen, rejected), float32[N] each."""
    with torch.autocast(model.device.type, compute_dtype, enabled=compute_dtype != torch.float32):
        scores = pooled_logits(model, [p.chosen for p in pairs] + [p.rejected for p in pairs])
    return scores[: len(pairs)], scores[len(pairs) :]


def _lr_share(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP_SHARE * steps))
    left = (steps - step) / max(1, steps - warmup)
    return min((step + 1) / warmup, FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * min(1.0, left))


def _batches(pairs: int, schedule: Schedule) -> Iterator[list[int]]:
    """Indices of the pairs of each step, reshuffled in every epoch."""
    rng = random.Random(schedule.seed)
    while True:
        order = rng.sample(range(pairs), pairs)
        yield from (order[i : i + schedule.batch_size] for i in range(0, pairs, schedule.batch_size))


def _micro_batches(pairs: Sequence[TokenisedPair], batch_tokens: int) -> Iterator[list[TokenisedPair]]:
    """The pairs sorted by length, as many at a time as fit in `batch_tokens`; a longer one goes alone."""
    micro: list[TokenisedPair] = []
    for pair in sorted(pairs, key=lambda pair: pair.longest):
        if micro and 2 * pair.longest * (len(micro) + 1) > batch_tokens:
            yield micro
            micro = []
        micro.append(pair)
    if micro:
        yield micro
