"""The trainer's end: a weight version on its GPU, or, without one, in shared memory."""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.weights.ipc.gpu_memory import GpuMemory, shared
from asyncrl.weights.shm.publisher import ShmPublisher

MARK_BYTES = 64


class IpcPublisher(ShmPublisher):
    """Publishes as `ShmPublisher` does, into one buffer: a version is taken before the next is there."""

    def __init__(self, prefix: str) -> None:
        super().__init__(prefix, buffers=1)
        self._on_gpu: Tensor | None = None
        self.gpu: GpuMemory | None = None
        """Where the version lies, unless in the host's memory."""

    def _memory(self, buffer: int, n_bytes: int) -> Tensor:
        if not torch.cuda.is_initialized():
            return super()._memory(buffer, n_bytes)
        if self._on_gpu is None:
            super()._memory(buffer, MARK_BYTES)  # goes with this process's end: so others know of it
            self._on_gpu = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
            self.gpu = shared(self._on_gpu)
        return self._on_gpu

    def close(self) -> None:
        super().close()
        self._on_gpu = None
