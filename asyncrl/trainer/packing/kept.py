"""Kept sets as tensors: over what the policy is to be renormalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from asyncrl.core.kept import KeptSets
from asyncrl.trainer.packing.device import OnDevice


@dataclass(frozen=True, slots=True)
class Kept(OnDevice):
    """The sets of N tokens (`KeptSets`), which list K ids in all."""

    ids: Tensor
    """int32[K]."""
    owners: Tensor
    """int32[K]: the token that each belongs to."""
    starts: tuple[int, ...]
    """Of length N + 1: the ids of token n are `starts[n] .. starts[n + 1]`. On the host, to slice by."""

    @classmethod
    def of(cls, kept: KeptSets) -> Self:
        owners = np.repeat(np.arange(len(kept.sizes), dtype=np.int32), kept.sizes)
        starts = np.append(0, np.cumsum(kept.sizes))
        return cls(torch.from_numpy(kept.ids), torch.from_numpy(owners), tuple(starts.tolist()))

    def left_out(self, tokens: slice, vocab_size: int) -> Tensor:
        """bool[n, V]: what n of the tokens were not sampled among."""
        listed = slice(self.starts[tokens.start], self.starts[tokens.stop])
        ids, rows = self.ids[listed].long(), self.owners[listed].long() - tokens.start
        lists_left_out = ids < 0
        elsewhere = torch.zeros(tokens.stop - tokens.start, dtype=torch.bool, device=ids.device)
        elsewhere[rows] = ~lists_left_out  # one value for all ids of a set
        table = elsewhere[:, None].repeat(1, vocab_size)
        table[rows, torch.where(lists_left_out, ~ids, ids)] = lists_left_out
        return table
