"""The slot KV cache: a row per running request, a position per row; the model's `past_key_values`."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

HUGE_PAGE = 2 << 20
"""Bytes, on most machines."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps per token."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def stores(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Heads and dimension of keys, and of values."""
        return (self.key_heads, self.key_dim), (self.value_heads, self.value_dim)


class _Fill:
    """Tokens 0 .. T of some rows, attending to each other only: `rows` int64[N]."""

    query_offset = 0
    width = None

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def write(self, store: Tensor, new: Tensor) -> Tensor:
        store[:, :, : new.shape[2]].index_copy_(0, self._rows, new)
        return new


class _Continue:
    """Tokens of some rows (int64[N]) at `positions` (int64[N, T]), attending to all before them in their
    rows."""

    def __init__(self, rows: Tensor, positions: Tensor, width: int) -> None:
        self.query_offset = positions[:, :1]
        self.width = width
        self._rows = rows
        self._positions = positions

    def write(self, store: Tensor, new: Tensor) -> Tensor:
        store[self._rows[:, None], :, self._positions] = new.transpose(1, 2)
        return store[:, :, : self.width].index_select(0, self._rows)


class _Decode:
    """One token of each row 0 .. A at its own position (int64[A]), attending to all before it in its row."""

    def __init__(self, positions: Tensor, width: int, room: int) -> None:
        self.query_offset = positions[:, None]
        self.width = width
        self._active = len(positions)
        self._row_starts = torch.arange(self._active, device=positions.device)[:, None] * room
        self._room = room
        self._lines: dict[int, Tensor] = {}

    def write(self, store: Tensor, new: Tensor) -> Tensor:
        heads, dim = store.shape[1], store.shape[3]
        store.view(-1, dim).index_copy_(0, self._flat_index(heads), new.reshape(-1, dim))
        return store[: self._active, :, : self.width]

    def _flat_index(self, heads: int) -> Tensor:
        """int64[A * heads]: the lines of `store.view(-1, dim)` that the new tokens take. Layers alike share
        it."""
        if heads not in self._lines:
            head_starts = torch.arange(heads, device=self.query_offset.device) * self._room
            self._lines[heads] = (self._row_starts * heads + head_starts + self.query_offset).reshape(-1)
        return self._lines[heads]


Access = _Fill | _Continue | _Decode


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [slots, heads, room, dim], at first with rooms as large as may be."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys: Tensor = keys
        self.values: Tensor = values
        self._memory = keys.view(-1), values.view(-1)
        self.is_initialized = True
        self.access: Access

    def lay_out(self, room: int) -> None:
        stores = zip((self.keys, self.values), self._memory, strict=True)
        self.keys, self.values = (_laid_out(store, memory, room) for store, memory in stores)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the layer is allocated when it is made."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        access = self.access
        return access.write(self.keys, key_states), access.write(self.values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.access.width or query_length, 0

    def get_seq_length(self) -> int | Tensor:  # type: ignore[override]  # one per row
        return self.access.query_offset

    def get_max_length(self) -> int:
        return self.keys.shape[2]


def _laid_out(store: Tensor, memory: Tensor, room: int) -> Tensor:
    """What `store` [slots, heads, any, dim] at the beginning of `memory` holds, there as [slots, heads, room,
    dim]."""
    kept = store[:, :, :room].clone()
    slots, heads, length, dim = kept.shape
    store = memory[: slots * heads * room * dim].view(slots, heads, room, dim)
    store[:, :, :length] = kept
    return store


def _zeros(count: int, like: Tensor) -> Tensor:
    """So many elements. Zeroed, since what lies past a row's position is read (with weight 0) and must be
    finite. On a CPU in huge pages where Linux gives some: a step reads all of them, and in pages of 4 KiB
    finding them takes a tenth of it."""
    if like.device.type != "cpu" or count * like.itemsize < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_zeros(count)
    size = -(-count * like.itemsize // HUGE_PAGE) * HUGE_PAGE
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype, count=count)


class SlotCache(Cache):
    """Before a forward pass, say with `fill` or `decode` which rows and positions its tokens belong to."""

    layers: list[_SlotLayer]  # type: ignore[assignment]  # transformers' annotation allows any layer

    def __init__(self, shapes: Sequence[LayerShape], slots: int, max_length: int, like: Tensor) -> None:
        """Allocates all of it, for rooms of `max_length` tokens. `like` gives dtype and device."""
        stores = [(slots, heads, max_length, dim) for shape in shapes for heads, dim in shape.stores]
        memory = _zeros(sum(map(math.prod, stores)), like).split(list(map(math.prod, stores)))
        views = (part.view(store) for part, store in zip(memory, stores, strict=True))
        super().__init__(layers=[_SlotLayer(keys, values) for keys, values in zip(views, views, strict=True)])
        self.room = max_length
        self.width: int | None = None
        """How much of each row the next forward's tokens may attend to; None: to each other only."""

    def fill(self, rows: Tensor) -> None:
        """The next forward's tokens [N, T] are the first T of `rows` (int64[N])."""
        self._set(_Fill(rows))

    def go_on(self, rows: Tensor, positions: Tensor, width: int) -> None:
        """The next forward's tokens [N, T] belong to `rows` (int64[N]), at `positions` (int64[N, T]), all
        less than `width`; they attend to what the rows hold before them, too."""
        self._set(_Continue(rows, positions, width))

    def decode(self, positions: Tensor, width: int) -> None:
        """The next forward's tokens [A, 1] belong to rows 0 .. A, at `positions` (int64[A]), all less than
        `width`."""
        self._set(_Decode(positions, width, self.room))

    def copy(self, sources: Tensor, targets: Tensor, width: int) -> None:
        """Copy the first `width` tokens of rows `sources` to rows `targets` (both int64[N]), as if all at
        once."""
        for layer in self.layers:
            for store in (layer.keys, layer.values):
                part = store[:, :, :width]
                part.index_copy_(0, targets, part.index_select(0, sources))

    def lay_out(self, room: int) -> None:
        """Give each row the room of so many tokens, with those that it has."""
        for layer in self.layers:
            layer.lay_out(room)
        self.room = room

    def _set(self, access: Access) -> None:
        self.width = access.width
        for layer in self.layers:
            layer.access = access
