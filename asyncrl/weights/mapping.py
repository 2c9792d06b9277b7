"""Host memory that a GPU copies from and into by itself: page-locked for as long as it is mapped."""

from __future__ import annotations

import logging
import mmap
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

HUGE_PAGES_FROM_BYTES = 8 << 20
_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every context of the process."""


class HostMap(mmap.mmap):
    """A mapping that may be page-locked. The lock is released before the memory is unmapped, which is when
    the last array or tensor over it is gone."""

    _asked = False
    _locked_at: int | None = None

    def lock_pages(self) -> None:
        """Register the memory with CUDA, so that copies to and from a GPU run at the speed of the bus, beside
        everything else. A refusal (limits on locked memory, say) is logged: copies are slower then."""
        if self._asked:
            return
        self._asked = True
        address = np.frombuffer(self, np.uint8).ctypes.data
        error = int(_cudart().cudaHostRegister(address, len(self), _PORTABLE))
        if not error:
            self._locked_at = address
            return
        log.warning(
            "CUDA cannot lock %d bytes of host memory (error %d), so copies to and from the GPU are "
            "slower; containers: `--ulimit memlock=-1`",
            len(self),
            error,
        )
        with suppress(RuntimeError):  # CUDA reports it once more, to the next kernel that this thread starts
            _empty_kernel()

    def __del__(self) -> None:
        if self._locked_at is not None:
            _cudart().cudaHostUnregister(self._locked_at)


def private_map(n_bytes: int) -> HostMap:
    """Zeroed memory of this process's own, in huge pages where the system has them: in pages of 4 KiB,
    getting the memory takes several times as long as copying into it."""
    mapped = HostMap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if n_bytes >= HUGE_PAGES_FROM_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            mapped.madvise(mmap.MADV_HUGEPAGE)
    return mapped


def over(mapped: mmap.mmap) -> Tensor:
    """uint8[N] that is the memory, and keeps it mapped."""
    import torch

    return torch.frombuffer(mapped, dtype=torch.uint8)


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart()


def _empty_kernel() -> None:
    import torch

    torch.zeros(1, device="cuda")
