"""Copy a payload and take its checksum, block by block, on several threads.

The checksum is CRC-32: it finds every single flipped bit, and misses a torn block by a chance of 2^-32. A
plain sum of words would be faster and wrong here: two versions of a model differ by a few last bits, up in
one weight and down in another, and such changes cancel. zlib and numpy release the GIL while they work, so
threads scale.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 4 << 20
"""A block that has just been copied is still in the cache when its checksum is taken."""

Bytes = NDArray[np.uint8]


def checksums(payload: Bytes, threads: int = 1) -> tuple[int, ...]:
    """CRC-32 of each block of uint8[N]."""
    return _each_block(len(payload), threads, lambda start, stop: zlib.crc32(payload[start:stop].data))


def copy(source: Bytes, target: Bytes, threads: int = 1) -> tuple[int, ...]:
    """Copy uint8[N] into uint8[N]. Returns the checksums of what arrived in `target`."""

    def copy_block(start: int, stop: int) -> int:
        block = target[start:stop]
        np.copyto(block, source[start:stop])
        return zlib.crc32(block.data)

    return _each_block(len(target), threads, copy_block)


def _each_block(n_bytes: int, threads: int, work: Callable[[int, int], int]) -> tuple[int, ...]:
    starts = range(0, n_bytes, BLOCK_BYTES)
    stops = [min(start + BLOCK_BYTES, n_bytes) for start in starts]
    if threads == 1 or len(starts) <= 1:
        return tuple(map(work, starts, stops))
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        return tuple(pool.map(work, starts, stops))
