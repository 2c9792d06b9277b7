"""Weight versions from GPU to GPU of one host, where the trainer has put them. Only what publishes or reads
them imports torch."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from asyncrl.weights.canary import Canary
from asyncrl.weights.published import PublishedWeights
from asyncrl.weights.shm.transport import SharedMemory
from asyncrl.weights.ticket import Ticket

if TYPE_CHECKING:
    from asyncrl.weights.ipc.publisher import IpcPublisher
    from asyncrl.weights.ipc.subscriber import IpcNotice, IpcWeights


class Ipc(SharedMemory):
    """A `Transport`: one buffer, on the trainer's GPU; without one, in shared memory."""

    keeps = 1

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder)
        self._folder = folder

    @cached_property
    def _publisher(self) -> IpcPublisher:
        from asyncrl.weights.ipc.publisher import IpcPublisher

        return IpcPublisher(self._name)

    def publish(self, version: int, weights: PublishedWeights, canary: Canary | None) -> bytes:
        from asyncrl.weights.ipc.subscriber import IpcNotice

        here = self._publisher.publish(version, weights, canary)
        return msgspec.msgpack.encode(IpcNotice(here, self._publisher.gpu))

    def source(self, notice: bytes) -> IpcWeights:
        from asyncrl.weights.ipc.subscriber import IpcWeights

        return IpcWeights(_decoded(notice), Ticket("ipc", self._name, str(self._folder), notice))

    def is_gone(self, notice: bytes) -> bool:
        return not Path(_decoded(notice).here.segment).exists()

    @staticmethod
    def host_bytes(version_bytes: int) -> int:
        """Where the trainer has no GPU."""
        return version_bytes

    @staticmethod
    def gpu_bytes(version_bytes: int) -> int:
        return version_bytes


def _decoded(notice: bytes) -> IpcNotice:
    from asyncrl.weights.ipc.subscriber import IpcNotice

    return msgspec.msgpack.decode(notice, type=IpcNotice)
