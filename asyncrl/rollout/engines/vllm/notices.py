"""A weight version as vLLM's processes can reach it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.published import WholeWeights
from asyncrl.weights.shm.publisher import ShmPublisher
from asyncrl.weights.shm.subscriber import ShmWeights
from asyncrl.weights.source import WeightSource


@contextmanager
def in_shared_memory(source: WeightSource) -> Iterator[WeightNotice]:
    """The notice of a version in shared memory: its own where it lies there, else of a copy that goes with
    the context. Blocking for a copy."""
    if isinstance(source, ShmWeights):
        yield source.notice
        return
    publisher = ShmPublisher(f"asyncrl-engine-{uuid.uuid4().hex[:12]}")
    try:
        yield publisher.publish(source.version, WholeWeights(source.tensors()), source.canary)
    finally:
        publisher.close()
