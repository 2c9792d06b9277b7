"""A trainer's weights as they are now, ready to be published."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from asyncrl.weights.manifest import Manifest


class ScatteredWeights(Protocol):
    """Weights that lie scattered over several ranks, to be gathered part by part."""

    manifest: Manifest

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the manifest, in its order. A tensor is whole and valid until the next is asked
        for, and for what was queued on the device's current stream until then, so that no more than a layer
        need be in one place at a time."""


LiveWeights = Mapping[str, Tensor] | ScatteredWeights
"""The weights that the next training step changes: by name where they lie in this process, else scattered."""
