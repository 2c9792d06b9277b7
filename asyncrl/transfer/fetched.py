"""A weight version of another host, as an engine takes it."""

from __future__ import annotations

from asyncrl.transfer.notice import TcpNotice
from asyncrl.transfer.receiver import Receiver
from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.shm.subscriber import ShmWeights


class FetchedWeights(ShmWeights):
    """Fetched once it is asked for, if it is not there already; or a newer one, which this host has by then
    or fetches in its place."""

    def __init__(self, notice: TcpNotice, receiver: Receiver) -> None:
        super().__init__(notice.here)
        self._told = notice
        self._receiver = receiver

    def in_memory(self) -> WeightNotice:
        self.notice = self._receiver.fetch(self._told)
        self.version, self.canary = self.notice.version, self.notice.canary
        return self.notice
