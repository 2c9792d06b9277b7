"""A Hugging Face decoder over transformers' own cache, one for each row: for what no slot cache can hold.

Recurrent states, attention of the model's own, positions that are counted from a mask: whatever a model keeps
of a sequence, it keeps in a cache of its own making. So each row is a batch of one, without padding, and a
step costs as many forwards as there are rows.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from asyncrl.decoders.forward import accepted, cache_name
from asyncrl.rollout.engines.torch.decoder import Decoder, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class _State:
    """What a model keeps of the first `length` tokens of a sequence."""

    cache: Any
    length: int


@dataclass(frozen=True, slots=True)
class _Row:
    filled: _State | None = None
    """Never goes on itself, so that rows can share it."""
    running: _State | None = None
    """The row's alone."""


class RowDecoder(Decoder):
    """`Decoder` whose rows each have a cache as the model itself makes it, which grows with them."""

    keeps_prefixes = False

    def __init__(self, model: PreTrainedModel, slots: int, max_length: int) -> None:
        super().__init__(model, slots, max_length)
        self._takes_positions = "position_ids" in accepted(model)
        name = cache_name(model)
        if name is None:
            raise UnsupportedModelError(
                f"{type(model).__name__}.forward takes no cache, so that it cannot decode"
            )
        self._cache_name = name
        self.leave()

    def leave(self) -> None:
        self._rows = [_Row()] * self.slots

    def come_back(self) -> None:
        """What rows need, they take as they are filled."""

    @torch.inference_mode()
    def fill(self, rows: NDArray[np.int64], tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        for row, ids, length in zip(rows, tokens, lengths, strict=True):
            self._rows[row] = _Row()  # frees its memory first
            _, cache = self._forward(ids[:length], None, 0)
            self._rows[row] = _Row(filled=_State(cache, int(length)))

    @torch.inference_mode()
    def decode(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        logits = []
        for row, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            of_row, cache = self._forward(token[None], self._cache_at(row, position), int(position))
            self._rows[row] = _Row(self._rows[row].filled, _State(cache, int(position) + 1))
            logits.append(of_row)
        return torch.cat(logits)

    def copy(self, sources: list[int], targets: list[int], width: int) -> None:
        # Two rows may so run on from one state: the one that it does not belong to starts anew from where it
        # was filled to.
        for target, row in zip(targets, [self._rows[source] for source in sources], strict=True):
            self._rows[target] = row

    def _cache_at(self, row: int, position: int) -> Any:
        """What the row keeps of its first `position` tokens, for it to go on from; None of none."""
        if position == 0:
            return None
        filled, running = self._rows[row].filled, self._rows[row].running
        if running is not None and running.length == position:
            return running.cache
        assert filled is not None and filled.length == position, f"row {row} has no state at {position}"
        return deepcopy(filled.cache)

    def _forward(self, tokens: NDArray[np.int64], cache: Any, start: int) -> tuple[Tensor, Any]:
        """Logits [1, V] after `tokens` [T], the first of which stands at `start`, and the cache with them."""
        ids = torch.from_numpy(tokens).to(self.device)[None]
        positions = {}
        if self._takes_positions:
            positions["position_ids"] = torch.arange(start, start + len(tokens), device=self.device)[None]
        output = self.model(
            input_ids=ids, use_cache=True, **{self._cache_name: cache}, **positions, **self._last_only
        )
        return output.logits[:, -1], output[self._cache_name]
