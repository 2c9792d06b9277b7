"""Memory of a GPU that other processes of the host map, by CUDA's IPC: torch's, without pickle."""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor


class GpuMemory(msgspec.Struct, frozen=True):
    """What another process needs to map it: what torch's `UntypedStorage._share_cuda_` tells, but for the
    device, which is the other process's own to choose."""

    memory: bytes
    n_bytes: int
    offset: int
    """In what CUDA has handed out as one."""
    counter: bytes
    counter_offset: int
    event: bytes
    waits: bool
    """For the event."""


def shared(tensor: Tensor) -> GpuMemory:
    """A tensor's whole storage. It must live for as long as others use it."""
    return GpuMemory(*tensor.untyped_storage()._share_cuda_()[1:])


def opened(shared: GpuMemory, device: torch.device) -> Tensor:
    """uint8[N], mapped for a GPU of the calling process: the one on which it lies, or one that reaches it."""
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *msgspec.structs.astuple(shared))
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
