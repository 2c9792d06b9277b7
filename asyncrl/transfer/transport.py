"""Weight versions over TCP: from the trainer's host to every other, once to each, and there through shared
memory. Only what publishes or reads them imports torch."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from asyncrl.roles import COORDINATOR
from asyncrl.runfiles.layout import RunDir
from asyncrl.transfer.notice import TcpNotice, this_host
from asyncrl.weights.canary import Canary
from asyncrl.weights.delta import kept_bytes
from asyncrl.weights.published import PublishedWeights
from asyncrl.weights.shm.segment import MOST_BUFFERS, buffers_for_far, shared_folder
from asyncrl.weights.shm.transport import SharedMemory
from asyncrl.weights.source import WeightsError
from asyncrl.wire.keys import Endpoint

if TYPE_CHECKING:
    from asyncrl.transfer.receiver import Receiver
    from asyncrl.transfer.source import Source
    from asyncrl.weights.shm.subscriber import ShmWeights


class Tcp:
    """A `Transport`. Engines on the trainer's host read what it has put into shared memory there.

    folder: where the coordinator's endpoint is, with the keys of the run.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        self._folder = folder
        self._host = this_host()

    @property
    def keeps(self) -> int:
        """Before a trainer's first version, which overwrites nothing, as many as may be: an engine that was
        behind when the trainer before it died comes no nearer until that version is there."""
        return self._source.keeps if "_source" in self.__dict__ else MOST_BUFFERS

    def publish(self, version: int, weights: PublishedWeights, canary: Canary | None) -> bytes:
        return msgspec.msgpack.encode(self._source.publish(version, weights, canary))

    def metrics(self) -> dict[str, float]:
        return self._source.metrics() if "_source" in self.__dict__ else {}

    def close(self) -> None:
        if "_source" in self.__dict__:
            self._source.close()
        self.leave()

    def leave(self) -> None:
        if "_receiver" in self.__dict__:
            self._receiver.close()

    def expect(self, notice: bytes) -> None:
        told = decoded(notice)
        if told.host != self._host:
            self._receiver.expect(told)

    def source(self, notice: bytes) -> ShmWeights:
        from asyncrl.transfer.fetched import FetchedWeights
        from asyncrl.weights.shm.subscriber import ShmWeights

        told = decoded(notice)
        if told.host == self._host:
            return ShmWeights(told.here)
        self._receiver.hear(told)
        return FetchedWeights(told, self._receiver)

    def is_gone(self, notice: bytes) -> bool:
        told = decoded(notice)
        if told.host == self._host:
            return not Path(told.here.segment).exists()
        return self._is_gone_there(told)

    def _is_gone_there(self, told: TcpNotice) -> bool:
        """With the trainer, from its host."""
        return self._receiver.is_gone(told)

    def sweep(self) -> None:
        """This host's. Others' goes as the processes there leave, or, where one was killed, with the next
        run."""
        for path in shared_folder().glob(f"{self._name}-*"):
            path.unlink(missing_ok=True)
        SharedMemory(self._name, self._folder).sweep()

    @staticmethod
    def host_bytes(version_bytes: int) -> int:
        """The versions, and the newest deltas."""
        versions = buffers_for_far(version_bytes)
        return versions * version_bytes + kept_bytes(version_bytes, versions)

    @cached_property
    def _source(self) -> Source:
        return self._make_source()

    def _make_source(self) -> Source:
        from asyncrl.transfer.source import Source

        return Source(self._name, self._host, self._run)

    @cached_property
    def _receiver(self) -> Receiver:
        from asyncrl.transfer.receiver import Receiver

        # What a start of the run before this one has left there, or still has there, is none of ours.
        run = self._run
        of_start = hashlib.blake2b(run.server_public.encode(), digest_size=4).hexdigest()
        return Receiver(f"{self._name}-{self._host}-{of_start}", self._host, run)

    @property
    def _run(self) -> Endpoint:
        endpoint = RunDir(self._folder).endpoint(COORDINATOR)
        if endpoint is None:
            raise WeightsError(f"{self._folder}: the coordinator of the run does not listen")
        return endpoint


def decoded(notice: bytes) -> TcpNotice:
    return msgspec.msgpack.decode(notice, type=TcpNotice)
