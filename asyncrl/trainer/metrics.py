"""Metrics of a batch that need no model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from asyncrl.core.records import Batch, FinishReason
from asyncrl.trainer.packing.batch import FlatBatch


def batch_metrics(batch: Batch, flat: FlatBatch) -> Iterator[tuple[str, float]]:
    """Rewards, lengths (tokens) and staleness (versions) by their names in `metrics.jsonl`.

    Staleness is over the trained tokens; means over no tokens are 0.
    """
    trajectories = [t for group in batch.groups for t in group.trajectories]
    yield "reward/mean", float(flat.rewards.mean())
    yield "reward/std", float(flat.rewards.std())
    parts: dict[str, list[float]] = defaultdict(list)
    for trajectory in trajectories:
        for name, value in trajectory.reward_parts.items():
            parts[name].append(value)
    for name, values in sorted(parts.items()):
        yield f"reward/{name}/mean", float(np.mean(values))
        yield f"reward/{name}/std", float(np.std(values))
    lengths = [t.sampled_tokens for t in trajectories]
    yield "response_tokens/mean", float(np.mean(lengths))
    yield "response_tokens/max", float(max(lengths))
    yield "truncated_frac", float(np.mean([t.finish_reason is FinishReason.LENGTH for t in trajectories]))
    ages = flat.ages[flat.loss_mask]
    yield "staleness/mean", float(ages.mean()) if len(ages) else 0.0
    yield "staleness/max", float(ages.max(initial=0))
    yield "trained_tokens", float(flat.trained_tokens)
    yield "masked_tokens", float(flat.sampled_tokens - flat.trained_tokens)
