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
        ids, mask, sequences = (t.cpu() for t in (tokens.ids, tokens.mask, tokens.sequences))
        asked = []
        for sequence in sequences[mask].unique().tolist()[self._ranks.rank :: self._ranks.size]:
            [at] = (sequences == sequence).nonzero(as_tuple=True)
            asked.append(at[: int(mask[at].nonzero()[-1]) + 1])
        result = torch.zeros(len(ids))
        for at, found in zip(asked, self._endpoint.scores([ids[at].tolist() for at in asked]), strict=True):
            result[at[1:]] = torch.tensor(found)
        return self._ranks.sum(torch.where(mask, result, 0.0).to(tokens.ids.device))
