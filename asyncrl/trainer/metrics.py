"""Metrics of a batch, and of its advantages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from asyncrl.core.records import Batch, FinishReason
from asyncrl.trainer.packing.batch import FlatBatch


def batch_metrics(batch: Batch, flat: FlatBatch) -> Iterator[tuple[str, float]]:
    """Rewards, lengths (tokens) and staleness (versions) by their names in `metrics.jsonl`.

    Staleness is over the trained tokens; means over no tokens are 0.
    """
    members = [member for group in batch.groups for member in group.members()]
    rewards = flat.rewards[flat.first_segments()]
    yield "reward/mean", float(rewards.mean())
    yield "reward/std", float(rewards.std())
    parts: dict[str, list[float]] = defaultdict(list)
    for first, *_ in members:
        for name, value in first.reward_parts.items():
            parts[name].append(value)
    for name, values in sorted(parts.items()):
        yield f"reward/{name}/mean", float(np.mean(values))
        yield f"reward/{name}/std", float(np.std(values))
    lengths = [sum(t.sampled_tokens for t in member) for member in members]
    yield "response_tokens/mean", float(np.mean(lengths))
    yield "response_tokens/max", float(max(lengths))
    truncated = [any(t.finish_reason is FinishReason.LENGTH for t in member) for member in members]
    yield "truncated_frac", float(np.mean(truncated))
    if len(members) < flat.sequences:
        yield "segments/mean", flat.sequences / len(members)
        splits = [{t.metadata.get("split") for t in member} for member in members]
        for reason in sorted(set().union(*splits) - {None}):
            yield f"segments/split_frac/{reason}", float(np.mean([reason in of_one for of_one in splits]))
    ages = flat.ages[flat.loss_mask]
    yield "staleness/mean", float(ages.mean()) if len(ages) else 0.0
    yield "staleness/max", float(ages.max(initial=0))
    yield "trained_tokens", float(flat.trained_tokens)
    yield "masked_tokens", float(flat.sampled.sum() - flat.trained_tokens)


def advantage_metrics(flat: FlatBatch, advantages: Tensor, targets: Tensor | None) -> dict[str, float]:
    """Over the trained tokens, of float[T] each; `adv/zero_groups_frac` is the share of the groups that teach
    nothing."""
    trained = torch.from_numpy(flat.loss_mask)
    of_trained = advantages.cpu()[trained].double()
    with_signal = flat.group_ids[flat.sequence_index()[trained][of_trained != 0].unique().numpy()]
    metrics = {
        "adv/zero_groups_frac": 1.0 - len(np.unique(with_signal)) / len(np.unique(flat.group_ids)),
        "adv/mean": float(of_trained.mean()),
        "adv/std": float(of_trained.std(correction=0)),
    }
    if targets is not None:
        metrics["critic/target_mean"] = float(targets.cpu()[trained].mean())
    return metrics
