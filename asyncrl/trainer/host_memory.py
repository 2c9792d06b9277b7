"""Host memory for copies of what a trainer has on its device, reused for every copy."""

from __future__ import annotations

import weakref
from collections.abc import Hashable

import torch
from torch import Tensor

from asyncrl.weights.manifest import ALIGNMENT_BYTES
from asyncrl.weights.mapping import over, private_map

AREA_BYTES = 256 << 20
"""Mapped, and page-locked for a GPU, at a time."""


class HostMemory:
    """Buffers by key, each made for the first tensor that is copied there; later ones have its shape and
    dtype."""

    def __init__(self) -> None:
        self._places: dict[Hashable, Tensor] = {}
        self._free: list[Tensor] = []
        self._device: torch.device | None = None

    def copy(self, key: Hashable, tensor: Tensor) -> Tensor:
        """A contiguous copy in the key's buffer, complete after `settle`. Before that, `tensor` may be freed,
        or overwritten on its device's current stream."""
        if key not in self._places:
            self._places[key] = self._new_place(tensor)
        if tensor.is_cuda:
            self._device = tensor.device
        return self._places[key].copy_(tensor.detach(), non_blocking=True)

    def settle(self) -> None:
        """Wait for the copies."""
        if self._device is not None:
            torch.cuda.current_stream(self._device).synchronize()

    def _new_place(self, like: Tensor) -> Tensor:
        n_bytes = -(-like.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        fitting = [i for i, area in enumerate(self._free) if len(area) >= n_bytes]
        if not fitting:
            self._free.append(_new_area(max(n_bytes, AREA_BYTES)))
        i = fitting[0] if fitting else -1
        place, self._free[i] = self._free[i][: like.nbytes], self._free[i][n_bytes:]
        return place.view(like.dtype).view(like.shape)


class Shelf:
    """Keeps the memory of a copy that is gone for the next one. A copy beside one that is still there gets
    memory of its own."""

    def __init__(self) -> None:
        self._kept: HostMemory | None = None

    def take(self, owner: object) -> HostMemory:
        """Memory that is `owner`'s for as long as that lives."""
        memory, self._kept = self._kept or HostMemory(), None
        weakref.finalize(owner, self._put_back, memory).atexit = False
        return memory

    def _put_back(self, memory: HostMemory) -> None:
        self._kept = memory


def _new_area(n_bytes: int) -> Tensor:
    mapped = private_map(n_bytes)
    if torch.cuda.is_initialized():
        mapped.lock_pages()
    return over(mapped)
