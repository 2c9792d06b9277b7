"""A weight version as vLLM's processes can reach it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.published import WholeWeights
from asyncrl.weights.shm.publisher import ShmPublisher
from asyncrl.weights.shm.subscriber import ShmWeights
from asyncrl.weights.source import WeightSource


@asynccontextmanager
async def in_shared_memory(source: WeightSource) -> AsyncIterator[WeightNotice]:
    """The notice of a version in shared memory: its own where it lies there whole, else of a copy that goes
    with the context."""
    if isinstance(source, ShmWeights):
        yield await asyncio.to_thread(source.in_memory)
        return
    publisher = ShmPublisher(f"asyncrl-engine-{uuid.uuid4().hex[:12]}")

    def copy() -> WeightNotice:
        return publisher.publish(source.version, WholeWeights(source.tensors()), source.canary)

    try:
        yield await asyncio.to_thread(copy)
    finally:
        publisher.close()
