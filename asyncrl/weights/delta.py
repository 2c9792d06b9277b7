"""What has changed from one version's payload to the next: lossless, and applied bit for bit.

A step of reinforcement learning changes few weights in bfloat16, where a learning rate of 1e-6 is far below
the spacing of most of them, and in float32 the last bits of each. So two payloads are put together by XOR,
bytes of the same rank in their words one after the other, and zstd makes little of the zeros.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
import zstandard

from asyncrl.weights.digest import Bytes
from asyncrl.weights.manifest import Manifest
from asyncrl.weights.source import WeightsError

BLOCK_BYTES = 4 << 20
"""Of a payload, compressed by itself: what a thread does at a time."""
SMALL_BYTES = 4 << 20
"""A delta of a payload up to this size is made in some milliseconds."""
_SAMPLED_BLOCKS, _SAMPLED_BYTES = 16, 128 << 10
"""So many, and so much of each, tell beforehand whether that would be so."""
_LEVEL = 1
"""Zstandard's fastest: zeros are as small on any."""

T = TypeVar("T")


class _Encoded(msgspec.Struct, frozen=True):
    word_bytes: int
    blocks: list[bytes]
    """A zstd frame of each block, empty where nothing has changed."""


_DECODER = msgspec.msgpack.Decoder(_Encoded)


@dataclass(frozen=True, slots=True)
class Delta:
    encoded: bytes
    changed_frac: float
    """The share of the words that differ."""


def word_bytes(manifest: Manifest) -> int:
    """Size of a value, in bytes: of most of a payload that has several dtypes."""
    of_size: Counter[int] = Counter()
    for entry in manifest.entries:
        of_size[entry.n_bytes // max(1, math.prod(entry.shape))] += entry.n_bytes
    size = max(of_size, key=of_size.__getitem__)
    return size if size in (1, 2, 4, 8) else 1


def largest_share(n_bytes: int) -> float:
    """Of a payload of so many bytes: above it a delta is not worth its making, and the whole version is sent.
    That of a small float32 model at a high learning rate has 0.6 of it, which a slow link is glad of."""
    return 0.8 if n_bytes <= SMALL_BYTES else 0.5


def kept_bytes(n_bytes: int, versions: int) -> int:
    """Of the newest deltas together, beside so many versions of so many bytes."""
    return int(largest_share(n_bytes) * n_bytes) * (versions // 2)


def difference(base: Bytes, target: Bytes, word_bytes: int, threads: int = 1) -> Delta | None:
    """Of two payloads, uint8[N] each, in words of so many bytes; None where it would be larger than their
    `largest_share`."""

    def block(start: int, n_bytes: int = BLOCK_BYTES) -> tuple[bytes, int]:
        return _block_difference(base[start : start + n_bytes], target[start : start + n_bytes], word_bytes)

    starts, most = range(0, len(base), BLOCK_BYTES), largest_share(len(base))
    sampled = starts[:: max(1, len(starts) // _SAMPLED_BLOCKS)]
    frames_bytes = sum(len(block(start, _SAMPLED_BYTES)[0]) for start in sampled)
    if frames_bytes > most * sum(min(_SAMPLED_BYTES, len(base) - start) for start in sampled):
        return None
    found = _each(block, starts, threads)
    encoded = msgspec.msgpack.encode(_Encoded(word_bytes, [frame for frame, _ in found]))
    if len(encoded) > most * len(base):
        return None
    return Delta(encoded, sum(n for _, n in found) / math.ceil(len(base) / word_bytes))


def apply(encoded: bytes | memoryview, base: Bytes, target: Bytes, threads: int = 1) -> None:
    """Write into `target` the payload that a difference to `base` was taken of (uint8[N] both, which do not
    overlap). Raises `WeightsError` for one that is damaged, or of payloads of another size."""
    starts = range(0, len(base), BLOCK_BYTES)

    def block(start: int) -> None:
        of_base, of_target = (payload[start : start + BLOCK_BYTES] for payload in (base, target))
        frame = delta.blocks[start // BLOCK_BYTES]
        if not frame:
            np.copyto(of_target, of_base)
            return
        shuffled = np.frombuffer(
            zstandard.ZstdDecompressor().decompress(frame, max_output_size=len(of_base)), np.uint8
        )
        whole = len(of_base) // delta.word_bytes * delta.word_bytes
        words = np.empty((whole // delta.word_bytes, delta.word_bytes), np.uint8)
        for rank, column in enumerate(shuffled[:whole].reshape(delta.word_bytes, -1)):
            words[:, rank] = column  # six times as fast as to transpose them at once
        np.bitwise_xor(of_base[:whole], words.reshape(-1), out=of_target[:whole])
        np.bitwise_xor(of_base[whole:], shuffled[whole:], out=of_target[whole:])

    try:
        delta = _DECODER.decode(encoded)
        if len(delta.blocks) != len(starts):
            raise ValueError(f"it has {len(delta.blocks)} blocks, not {len(starts)}")
        _each(block, starts, threads)
    except (ValueError, ZeroDivisionError, zstandard.ZstdError) as error:
        raise WeightsError(f"a delta of weights is damaged: {error}") from error


def _block_difference(base: Bytes, target: Bytes, word_bytes: int) -> tuple[bytes, int]:
    """A frame, and how many words differ."""
    changed = np.bitwise_xor(base, target)
    if not changed.any():
        return b"", 0
    whole = len(changed) // word_bytes * word_bytes
    words, rest = changed[:whole], changed[whole:]
    n_changed = np.count_nonzero(words.view(f"u{word_bytes}")) + bool(rest.any())
    shuffled = np.concatenate([words.reshape(-1, word_bytes).T.reshape(-1), rest])
    return zstandard.ZstdCompressor(_LEVEL).compress(shuffled.data), int(n_changed)


def _each(work: Callable[[int], T], starts: Iterable[int], threads: int) -> list[T]:
    with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
        return list(pool.map(work, starts))
