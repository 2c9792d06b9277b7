"""The tensors that make up a weight version, as the trainer has them now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from asyncrl.weights.manifest import Manifest
from asyncrl.weights.source import untied

if TYPE_CHECKING:
    from torch import Tensor


class PublishedWeights(Protocol):
    """What engines are given, which need not be what is trained. The next training step changes it."""

    @property
    def manifest(self) -> Manifest: ...

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the manifest, in its order. A tensor is whole and valid until the next is asked
        for, and for what was queued on the device's current stream until then, so that of weights that lie
        scattered over several ranks no more than a layer need be in one place at a time."""


class WholeWeights(dict[str, "Tensor"]):
    """`PublishedWeights` that lie in this process: live tensors by name, tied ones once, under their first
    name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__((name, tensor.detach()) for name, tensor in untied(tensors).items())

    @property
    def manifest(self) -> Manifest:
        return Manifest.of(self)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.items())
