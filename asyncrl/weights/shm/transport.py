"""Weight versions through the shared memory of one host. Only what publishes or reads them imports torch."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from asyncrl.weights.canary import Canary
from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.published import PublishedWeights
from asyncrl.weights.shm.segment import BUFFERS, sweep, sweep_abandoned

if TYPE_CHECKING:
    from asyncrl.weights.shm.publisher import ShmPublisher
    from asyncrl.weights.shm.subscriber import ShmWeights


class SharedMemory:
    """A `Transport`: two buffers, written in turns (`ShmPublisher`, `ShmWeights`).

    name: begins as those of all runs do, up to its last `-`.
    """

    keeps = BUFFERS

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name

    @cached_property
    def _publisher(self) -> ShmPublisher:
        from asyncrl.weights.shm.publisher import ShmPublisher

        return ShmPublisher(self._name)

    def publish(self, version: int, weights: PublishedWeights, canary: Canary | None) -> bytes:
        return msgspec.msgpack.encode(self._publisher.publish(version, weights, canary))

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._publisher.close()

    def source(self, notice: bytes) -> ShmWeights:
        from asyncrl.weights.shm.subscriber import ShmWeights

        return ShmWeights(_decoded(notice))

    def leave(self) -> None: ...

    def is_gone(self, notice: bytes) -> bool:
        return not Path(_decoded(notice).segment).exists()

    def sweep(self) -> None:
        """What runs whose launcher was killed have left goes, too."""
        sweep(self._name)
        sweep_abandoned(self._name.rpartition("-")[0] + "-")

    @staticmethod
    def host_bytes(version_bytes: int) -> int:
        return BUFFERS * version_bytes


def _decoded(notice: bytes) -> WeightNotice:
    return msgspec.msgpack.decode(notice, type=WeightNotice)
