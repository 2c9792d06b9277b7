"""What a greedy response has earned, which workers have sampled beside each group and left out of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from asyncrl.core.records import Batch
from asyncrl.trainer.lesson import Lesson
from asyncrl.trainer.packing.batch import BatchError, FlatBatch


class GreedyBaseline(Lesson):
    """Tells it to the advantage (`objective.advantages.Outcomes.baselines`)."""

    def flatten(self, batch: Batch, flat: FlatBatch) -> FlatBatch:
        earned = {group.group_id: group.left_out.rewards for group in batch.groups}
        for group_id, rewards in earned.items():
            if len(rewards) != 1:
                raise BatchError(
                    f"group {group_id} has the rewards {rewards} of responses that were left out of it; with "
                    "rollout.choose=greedy_baseline there is one, that of the greedy response"
                )
        of_sequences = [earned[group_id][0] for group_id in flat.group_ids.tolist()]
        return replace(flat, baselines=np.array(of_sequences, np.float64))
