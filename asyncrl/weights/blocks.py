"""Copy the spans of a payload and take their digests, block by block, on several threads: numpy releases the
GIL while it works, so threads scale."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from asyncrl.weights.digest import CHUNK_BYTES, Bytes, Sums, chunk_sums, digest

BLOCK_BYTES = 128 * CHUNK_BYTES
"""What a thread does at a time."""

Spans = Sequence[tuple[int, int]]
"""Where each starts and stops, in bytes."""


def spare_threads() -> int:
    """For work beside what this process computes: half the cores it may use. A few reach memory's speed."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // 2))


def digests(payload: Bytes, spans: Spans, threads: int = 1) -> tuple[int, ...]:
    """Of each span of uint8[N] (see `digest`)."""
    return _each_block(payload, None, spans, threads)


def copy(source: Bytes, target: Bytes, spans: Spans, threads: int = 1) -> tuple[int, ...]:
    """Copy the spans of uint8[N] into uint8[N]. Returns the digests of what arrived in `target`."""
    return _each_block(source, target, spans, threads)


def _each_block(source: Bytes, target: Bytes | None, spans: Spans, threads: int) -> tuple[int, ...]:
    def work(span: int, start: int, stop: int) -> Sums:
        return chunk_sums(source[start:stop], None if target is None else target[start:stop])

    blocks = [
        (number, at, min(at + BLOCK_BYTES, stop))
        for number, (start, stop) in enumerate(spans)
        for at in range(start, stop, BLOCK_BYTES)
    ]
    if threads == 1 or len(blocks) <= 1:
        results = [work(*block) for block in blocks]
    else:
        with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
            results = list(pool.map(work, *zip(*blocks, strict=True)))
    sums: list[list[Sums]] = [[np.empty(0, np.int64)] for _ in spans]
    for (number, _, _), result in zip(blocks, results, strict=True):
        sums[number].append(result)
    return tuple(
        digest(np.concatenate(of_span), stop - start)
        for of_span, (start, stop) in zip(sums, spans, strict=True)
    )
