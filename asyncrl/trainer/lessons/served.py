"""A policy that another machine computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from asyncrl.config import TeacherConfig
from asyncrl.trainer.lessons.endpoint import Endpoint
from asyncrl.trainer.packing.batch import TokenBatch
from asyncrl.trainer.packing.mini_batch import MiniBatch
from asyncrl.trainer.ranks import Ranks


class ServedPolicy:
    """As `FrozenPolicy`, behind `teacher.endpoint`: each rank asks about its share of the sequences."""

    policy = None

    def __init__(self, config: TeacherConfig, ranks: Ranks) -> None:
        self._endpoint = Endpoint(config, config.concurrency // ranks.size or 1)
        self._ranks = ranks

    def logprobs(self, minis: Sequence[MiniBatch], tokens: TokenBatch) -> Tensor:
        """float32[T]: of every trained token of the batch, 0 elsewhere. Raises `RunFailed`."""
        ids, mask = tokens.ids.cpu(), tokens.mask.cpu()
        lengths = torch.bincount(tokens.sequences.cpu())
        spans = []
        for end, length in zip(lengths.cumsum(0).tolist(), lengths.tolist(), strict=True):
            if len(
                trained := mask[end - length : end].nonzero()
            ):  # what follows the last of them is not read
                spans.append(slice(end - length, end - length + int(trained[-1]) + 1))
        mine = spans[self._ranks.rank :: self._ranks.size]
        result = torch.zeros(len(ids))
        for span, found in zip(mine, self._endpoint.scores([ids[s].tolist() for s in mine]), strict=True):
            result[span.start + 1 : span.stop] = torch.tensor(found)
        return self._ranks.sum(torch.where(mask, result, 0.0).to(tokens.ids.device))
