"""A weight version as vLLM's processes can reach it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.published import WholeWeights
from asyncrl.weights.shm.publisher import ShmPublisher
from asyncrl.weights.shm.subscriber import ShmWeights
from asyncrl.weights.source import WeightSource
from asyncrl.weights.ticket import Ticket


class Reachable(msgspec.Struct, frozen=True):
    """A version that lies in this host's shared memory, or that each process is to take for itself."""

    notice: WeightNotice
    ticket: Ticket | None = None

    def source(self) -> ShmWeights:
        """In any process of the host."""
        source = ShmWeights(self.notice) if self.ticket is None else self.ticket.source()
        assert isinstance(source, ShmWeights)
        return source


@asynccontextmanager
async def reachable(source: WeightSource) -> AsyncIterator[Reachable]:
    """A version as it lies in shared memory whole, or as its transport brings it to any process; else a copy
    in shared memory that goes with the context."""
    if isinstance(source, ShmWeights):
        notice = source.notice if source.ticket else await asyncio.to_thread(source.in_memory)
        yield Reachable(notice, source.ticket)
        return
    publisher = ShmPublisher(f"asyncrl-engine-{uuid.uuid4().hex[:12]}")

    def copy() -> WeightNotice:
        weights = WholeWeights(source.tensors())  # by which the source may have become a newer version
        return publisher.publish(source.version, weights, source.canary)

    try:
        yield Reachable(await asyncio.to_thread(copy))
    finally:
        publisher.close()
