"""An engine's end: a weight version where the trainer has put it."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from asyncrl.weights import blocks
from asyncrl.weights.digest import device_sums, digests_of
from asyncrl.weights.ipc.gpu_memory import GpuMemory, opened
from asyncrl.weights.manifest import WeightNotice
from asyncrl.weights.mapping import over
from asyncrl.weights.shm.segment import attach
from asyncrl.weights.shm.subscriber import ShmWeights
from asyncrl.weights.source import WeightsError
from asyncrl.weights.ticket import Ticket


class IpcNotice(msgspec.Struct, frozen=True):
    here: WeightNotice
    gpu: GpuMemory | None
    """Where the payload lies, unless in the host's memory."""


class IpcWeights(ShmWeights):
    """A version on the trainer's GPU, or in the host's memory. The trainer does not write there again before
    this engine says that it has it."""

    def __init__(self, notice: IpcNotice, ticket: Ticket) -> None:
        super().__init__(notice.here)
        self.ticket = ticket
        self._gpu = notice.gpu
        self._lent: Tensor | None = None

    def tensors(self) -> Mapping[str, Tensor]:
        """Private, verified copies. Of a version on a GPU they lie on the one that this process computes on,
        or, where it does not, in the host's memory."""
        if self._gpu is None:
            return super().tensors()
        is_on_gpu = torch.cuda.is_initialized()
        lent = self._opened()
        private = lent.clone() if is_on_gpu else lent.cpu()
        self._verify(self._digests(private))
        return self.notice.manifest.views(private)

    def borrowed(self) -> Mapping[str, Tensor]:
        self._lent = self._opened()
        self._verify(self._digests(self._lent))
        return self.notice.manifest.views(self._lent)

    def give_back(self) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            self._verify(self._digests(lent))

    def _opened(self) -> Tensor:
        """uint8[N], the payload itself. Raises `WeightsError` where the trainer has ended."""
        n_bytes = self.notice.manifest.n_bytes
        if self._gpu is None:
            return over(attach(Path(self.notice.segment), n_bytes, mmap.ACCESS_COPY))  # torch wants to write
        attach(Path(self.notice.segment), 0)
        if not torch.cuda.is_available():
            raise WeightsError(
                f"weight version {self.version} lies on the trainer's GPU, which an engine without one does "
                "not reach; use weights.transport=shm"
            )
        try:
            return opened(self._gpu, torch.device("cuda", torch.cuda.current_device()))
        except RuntimeError as error:  # CUDA's
            raise WeightsError(
                f"weight version {self.version} lies on the trainer's GPU, and this engine's cannot map it: "
                f"{error}; use weights.transport=shm"
            ) from error

    def _digests(self, payload: Tensor) -> tuple[int, ...]:
        entries = self.notice.manifest.entries
        if payload.device.type == "cpu":
            return blocks.digests(payload.numpy(), [entry.span for entry in entries], self.threads)
        sums = {entry.name: device_sums(payload[slice(*entry.span)]) for entry in entries}
        return tuple(digests_of(sums, {entry.name: entry.n_bytes for entry in entries}).values())
