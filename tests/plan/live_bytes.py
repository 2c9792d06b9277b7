"""Counts the bytes of every tensor that lives on a device, the meta device as any other."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within the block, `now` and `peak`: bytes of the storages that operations have made since, each counted
    once and for as long as anything refers to it. What an operation takes and frees by itself is not seen."""

    def __init__(self, device: str, there_before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._device = device
        self.now = self.peak = 0
        self._known = {}
        for tensor in there_before:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def peak_since(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device:
                self._hold(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def forget(_: weakref.ref) -> None:
            del self._known[key]
            self.now -= n_bytes

        self._known[key] = weakref.ref(storage, forget)
        self.now += n_bytes


@contextmanager
def saved_bytes(parameters: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes by storage that autograd saves in the block, but for those of the parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in parameters}
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            kept.append(storage)  # or a later one may take its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved
