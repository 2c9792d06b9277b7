"""The trainer's end: puts weight versions into shared memory."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor

from asyncrl.weights import blocks
from asyncrl.weights.canary import Canary
from asyncrl.weights.digest import device_sums, digests_of
from asyncrl.weights.manifest import Manifest, WeightNotice
from asyncrl.weights.mapping import HostMap, over
from asyncrl.weights.published import PublishedWeights
from asyncrl.weights.shm.segment import BUFFERS, create, segment_path
from asyncrl.weights.source import WeightsError


class ShmPublisher:
    """Publishes weight versions to this host, version v into buffer v % `buffers`.

    Whoever publishes version v makes sure first that no engine is still reading version v - `buffers`; a
    reader that is overtaken all the same finds out by the checksum. One thread at a time may publish.

    threads: threads for the digests of weights on the CPU; by default those that torch has.
    """

    def __init__(self, prefix: str, threads: int | None = None, *, buffers: int = BUFFERS) -> None:
        self._paths = [segment_path(prefix, buffer) for buffer in range(buffers)]
        self._threads = threads or torch.get_num_threads()
        self._maps: dict[int, HostMap] = {}
        self._manifest: Manifest | None = None
        self._version: int | None = None
        self._closed = False

    def publish(self, version: int, weights: PublishedWeights, canary: Canary | None = None) -> WeightNotice:
        """Copy the weights (any device, dtype and strides; tied ones once) into the version's buffer, and let
        `canary` go along in the notice.

        Raises `ValueError` when names, dtypes or shapes differ from the first version's or the version does
        not rise, `WeightsError` when there is no shared memory left.
        """
        started = time.perf_counter()
        manifest = self._checked(version, weights.manifest)
        checksums = self._copy(manifest, weights.parts(), version % len(self._paths))
        self._manifest, self._version = manifest, version
        path = self._paths[version % len(self._paths)]
        return WeightNotice(version, str(path), manifest, checksums, time.perf_counter() - started, canary)

    def payload(self, version: int) -> Tensor:
        """uint8[N], what has been published of it: valid until its buffer is written again."""
        return over(self._maps[version % len(self._paths)])

    def close(self) -> None:
        """Unlink the segments. Engines that are reading finish undisturbed; later ones get `WeightsError`."""
        self._closed = True
        for buffer in self._maps:
            self._paths[buffer].unlink(missing_ok=True)
        self._maps.clear()  # a mapping goes with the last tensor over it

    def _checked(self, version: int, manifest: Manifest) -> Manifest:
        if self._closed:
            raise WeightsError(f"cannot publish version {version}: the publisher is closed")
        if version < 0 or (self._version is not None and version <= self._version):
            raise ValueError(f"cannot publish version {version} after {self._version}: versions rise from 0")
        if not manifest.n_bytes:
            raise ValueError(f"version {version} has no weights in it")
        if self._manifest is not None and (difference := self._manifest.difference(manifest)):
            raise ValueError(
                f"version {version} does not have the layout of version {self._version}: {difference}"
            )
        return manifest

    @torch.no_grad()
    def _copy(self, manifest: Manifest, parts: Iterable[tuple[str, Tensor]], buffer: int) -> tuple[int, ...]:
        """Returns the tensors' digests. A GPU copies and digests by itself what lies on it, or comes to."""
        payload = self._memory(buffer, manifest.n_bytes)
        views = manifest.views(payload)
        apart: dict[str, Tensor] = {}
        for name, tensor in parts:
            if computes_apart(tensor) and not computes_apart(payload):
                self._maps[buffer].lock_pages()
            views[name].copy_(tensor, non_blocking=True)
            for one in (tensor, views[name]):
                if computes_apart(one):
                    apart[name] = device_sums(one)
                    break
        here = {e.name: e.span for e in manifest.entries if e.name not in apart}
        found: dict[str, int] = {}
        if here:
            digests = blocks.digests(payload.numpy(), list(here.values()), self._threads)
            found |= zip(here, digests, strict=True)
        if apart:
            # This waits for the copies too, which were asked for before.
            found |= digests_of(apart, {e.name: e.n_bytes for e in manifest.entries})
        return tuple(found[e.name] for e in manifest.entries)

    def _memory(self, buffer: int, n_bytes: int) -> Tensor:
        """uint8[N] of the segment."""
        if buffer not in self._maps:
            self._maps[buffer] = create(self._paths[buffer], n_bytes)
        return over(self._maps[buffer])


def computes_apart(tensor: Tensor) -> bool:
    """Whether it lies on a device that works beside this thread."""
    return tensor.device.type != "cpu"
