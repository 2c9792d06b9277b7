"""Where an engine gets a weight version from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from asyncrl.errors import AsyncRLError
from asyncrl.weights.canary import Canary

if TYPE_CHECKING:
    from torch import Tensor


class WeightsError(AsyncRLError, RuntimeError):
    """A weight version cannot be published, or cannot be read whole and unchanged. Nothing was applied."""


class WeightSource(Protocol):
    """One weight version, ready to be read."""

    version: int
    """It may have become a newer one, with its canary, once `tensors` has returned."""
    canary: Canary | None
    """Where there is one, an engine that packs or converts weights proves by it that it computes with
    them."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Verified private copies of the weights by `state_dict` name (tied tensors once, under their first
        name), which the caller may keep and adopt. Blocking; raises `WeightsError` when the checksum does not
        match."""


class LocalWeights:
    """A weight version held by this very process: for `inline` mode and tests."""

    def __init__(self, version: int, tensors: Mapping[str, Tensor], canary: Canary | None = None) -> None:
        self.version = version
        self.canary = canary
        self._tensors = tensors

    def tensors(self) -> Mapping[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in untied(self._tensors).items()}


def untied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out every tensor that is the same memory, seen the same way, as one before it (`lm_head.weight`
    of a model with tied embeddings). Those without memory (such as scattered ones) are told apart as
    objects."""
    first: dict[object, tuple[str, Tensor]] = {}
    for name, t in tensors.items():
        memory = (t.device, t.data_ptr(), t.dtype, t.shape, t.stride())
        first.setdefault(memory if t.numel() else id(t), (name, t))
    return dict(first.values())
