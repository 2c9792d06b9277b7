"""What a published weight version looks like: where each tensor lies in the payload, and the notice that
tells readers.

Both are plain dataclasses of numbers and strings, so that msgspec carries them in a message header.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from asyncrl.weights.canary import Canary
from asyncrl.weights.source import WeightsError, untied

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ALIGNMENT_BYTES = 64
"""Tensors start at multiples of this: a cache line, and the widest vector register."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor, stored contiguously in the payload's bytes `offset .. offset + n_bytes`."""

    name: str
    dtype: str
    """torch's name of it, such as `bfloat16`."""
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def span(self) -> tuple[int, int]:
        """Where it starts and stops in the payload, in bytes."""
        return self.offset, self.offset + self.n_bytes

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The layout of a payload. Equal models have equal manifests."""

    entries: tuple[TensorEntry, ...]
    n_bytes: int
    """Size of the whole payload, padding included."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Lay tensors out in their order, tied ones once, under their first name."""
        return cls.lay_out((name, t.dtype, tuple(t.shape)) for name, t in untied(tensors).items())

    @classmethod
    def lay_out(cls, tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> Self:
        """The same from names, dtypes and shapes."""
        entries = []
        end = 0
        for name, dtype, shape in tensors:
            offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            n_bytes = math.prod(shape) * dtype.itemsize
            entries.append(TensorEntry(name, str(dtype).removeprefix("torch."), shape, offset, n_bytes))
            end = offset + n_bytes
        return cls(tuple(entries), end)

    def views(self, payload: Tensor) -> dict[str, Tensor]:
        """The tensors inside a payload (uint8[n_bytes]), by name, sharing its memory."""
        return {e.name: payload[slice(*e.span)].view(_dtype(e)).view(e.shape) for e in self.entries}

    def difference(self, other: Manifest) -> str | None:
        """The first difference to `other`, in words; None when they are equal."""
        if self == other:
            return None
        mine, theirs = ({e.name: e for e in m.entries} for m in (self, other))
        for name in mine.keys() | theirs.keys():
            if name not in theirs:
                return f"{mine[name]} is missing"
            if name not in mine:
                return f"{theirs[name]} is new"
            if (mine[name].dtype, mine[name].shape) != (theirs[name].dtype, theirs[name].shape):
                return f"{mine[name]} has become {theirs[name]}"
        return "the same tensors come in another order"


@dataclass(frozen=True, slots=True)
class WeightNotice:
    """Tells readers of this host that a weight version is there. Valid until the same buffer is written
    again, two versions later; the checksums tell whoever comes too late."""

    version: int
    segment: str
    """Path of the shared memory."""
    manifest: Manifest
    checksums: tuple[int, ...]
    """The digest of each tensor (see `digest`), in the manifest's order."""
    publish_s: float
    """What publishing took: copy and digest."""
    canary: Canary | None = None
    """For engines that can prove what they compute."""


def _dtype(entry: TensorEntry) -> torch.dtype:
    import torch

    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise WeightsError(
            f"tensor {entry.name}: this torch ({torch.__version__}) has no dtype {entry.dtype!r}"
        )
    return dtype
