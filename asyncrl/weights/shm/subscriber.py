"""An engine's end: reads a weight version out of shared memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asyncrl.weights import blocks
from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.mapping import HUGE_PAGES_FROM_BYTES, over, private_map
from asyncrl.weights.shm.segment import attach
from asyncrl.weights.source import WeightsError
from asyncrl.weights.ticket import Ticket

log = logging.getLogger(__name__)


class ShmWeights:
    """A published weight version, as a `WeightSource`. Holds no memory and no descriptor between calls.

    threads: threads for copy and digest; by default those that torch has.
    """

    def __init__(self, notice: WeightNotice, threads: int | None = None) -> None:
        self.version = notice.version
        self.canary = notice.canary
        self.notice = notice
        self.ticket: Ticket | None = None
        """By which other processes of the host are to take the version, where it does not come to lie in the
        host's shared memory."""
        self.threads = threads or torch.get_num_threads()

    def in_memory(self) -> WeightNotice:
        """The notice of the version once it lies in this host's shared memory, and `notice` from then on.
        Blocking; raises `WeightsError`."""
        return self.notice

    def tensors(self) -> Mapping[str, Tensor]:
        """Private, verified copies on the CPU, all in one allocation.

        Raises `WeightsError` when the segment is gone or its content is no longer this version; the newest
        notice is the one to read then.
        """
        notice = self.in_memory()
        announced, expected = len(notice.checksums), len(notice.manifest.entries)
        if announced != expected:
            raise WeightsError(
                f"the notice of weight version {self.version} has {announced} checksums for {expected} "
                "tensors"
            )
        private = _private_bytes(notice.manifest.n_bytes)
        self._verify(self._fill(private, [entry.span for entry in notice.manifest.entries]))
        return notice.manifest.views(private)

    def borrowed(self) -> Mapping[str, Tensor]:
        """As `tensors`, but not to be written to, nor kept beyond `give_back`: no copies, where the version
        can be read as it lies there."""
        return self.tensors()

    def give_back(self) -> None:
        """What was borrowed is of no more use. Raises `WeightsError` where it is no longer the version."""

    def _fill(self, private: Tensor, spans: blocks.Spans) -> tuple[int, ...]:
        """Returns the digests of what was read. The mapping goes with the last array that looks into it:
        here, even when the caller raises and its frame lives on in a traceback."""
        mapped = attach(Path(self.notice.segment), len(private))
        source = np.frombuffer(mapped, dtype=np.uint8)
        return blocks.copy(source, private.numpy(), spans, self.threads)

    def _verify(self, arrived: tuple[int, ...]) -> None:
        entries, announced = self.notice.manifest.entries, self.notice.checksums
        bad = [e.name for e, a, b in zip(entries, arrived, announced, strict=True) if a != b]
        if not bad:
            return
        raise WeightsError(
            f"weight version {self.version} in {self.notice.segment} does not match its checksum in "
            f"{len(bad)} of {len(entries)} tensors (the first is {bad[0]}): a newer version has "
            "overwritten it, or memory is damaged; nothing was applied"
        )


def _private_bytes(n_bytes: int) -> Tensor:
    """uint8[n_bytes] of this process's own.

    It comes in huge pages where there are any: an engine gives the memory of the version before back during
    its pause. An engine on a GPU gets page-locked memory: what it copies to the GPU from there takes a
    fraction of the time, and no thread waits for it. torch keeps it for the next version.
    """
    if torch.cuda.is_initialized():
        try:
            return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            log.warning("no pinned memory for %d bytes of weights, so updates are slower: %s", n_bytes, error)
    if n_bytes < HUGE_PAGES_FROM_BYTES:
        return torch.empty(n_bytes, dtype=torch.uint8)
    return over(private_map(n_bytes))
