"""A weight version that is broadcast, as an engine takes it."""

from __future__ import annotations

from torch import Tensor

from asyncrl.transfer.collective.member import Member
from asyncrl.transfer.notice import TcpNotice
from asyncrl.weights import blocks
from asyncrl.weights.shm.subscriber import ShmWeights
from asyncrl.weights.ticket import Ticket


class ReceivedWeights(ShmWeights):
    """Received once it is asked for, straight into this process's own memory.

    ticket: for other processes that are to receive it themselves.
    """

    def __init__(self, notice: TcpNotice, member: Member, ticket: Ticket) -> None:
        super().__init__(notice.here)
        self.ticket = ticket
        self._told = notice
        self._member = member

    def _fill(self, private: Tensor, spans: blocks.Spans) -> tuple[int, ...]:
        self._member.receive(self._told, private)
        return blocks.digests(private.numpy(), spans, self.threads)
