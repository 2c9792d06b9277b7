"""Weight versions by broadcast, between GPUs or hosts' memories, to every engine at once. Only what publishes
or reads them imports torch."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from asyncrl.transfer.notice import TcpNotice
from asyncrl.transfer.transport import Tcp, decoded
from asyncrl.weights.shm.segment import buffers_for_far
from asyncrl.weights.ticket import Ticket

if TYPE_CHECKING:
    from asyncrl.transfer.collective.member import Member
    from asyncrl.transfer.collective.received import ReceivedWeights
    from asyncrl.transfer.collective.source import BroadcastSource


class Collective(Tcp):
    """A `Transport`. Versions lie in the shared memory of the trainer's host, as with the others, and engines
    on any host receive them in a process group of all that want the same version."""

    def expect(self, notice: bytes) -> None:
        """Nothing: a broadcast goes to the engines themselves."""

    def source(self, notice: bytes) -> ReceivedWeights:
        from asyncrl.transfer.collective.received import ReceivedWeights

        told = decoded(notice)
        self._member.hear(told)
        ticket = Ticket("collective", self._name, str(self._folder), notice)
        return ReceivedWeights(told, self._member, ticket)

    def _is_gone_there(self, told: TcpNotice) -> bool:
        return self._member.is_gone(told)

    @property
    def is_by_nccl(self) -> bool:
        """Whether the last version that came here came by NCCL."""
        return self._member.is_by_nccl

    def leave(self) -> None:
        if "_member" in self.__dict__:
            self._member.close()

    @staticmethod
    def host_bytes(version_bytes: int) -> int:
        return buffers_for_far(version_bytes) * version_bytes

    def _make_source(self) -> BroadcastSource:
        from asyncrl.transfer.collective.source import BroadcastSource

        return BroadcastSource(self._name, self._host, self._run)

    @cached_property
    def _member(self) -> Member:
        from asyncrl.transfer.collective.member import Member

        return Member(self._host, self._run)
