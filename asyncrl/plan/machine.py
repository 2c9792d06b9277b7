"""What the machine has, and what a container leaves of it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace

import psutil

from asyncrl.container import container_limits
from asyncrl.weights.shm.segment import shared_folder

PLANNED_GPU_BYTES = 80 * 10**9
"""Memory of a GPU that is only planned for."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """Equal machines that a run is spread over."""

    count: int = 1
    gpus_each: int | None = None
    """None: as many as there are here."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use of the machine."""

    cores: int
    memory_bytes: int
    gpu_bytes: tuple[int, ...]
    """Memory of each GPU that CUDA can use."""
    shared_memory_bytes: int | None
    """Free shared memory; None where it is not limited apart from the memory (macOS)."""
    own_cores: tuple[int, ...] = ()
    """Numbers of the cores that are this process's alone to give away; none where the system lets nobody
    choose (macOS), and where a container limits CPU time: what others may compute on the same cores."""

    @property
    def gpus(self) -> int:
        return len(self.gpu_bytes)

    def over(self, nodes: Nodes) -> Machine:
        """So many machines like this one, as one. Nothing is known of the others' cores but their number."""
        if nodes == Nodes():
            return self
        each = self.gpus if nodes.gpus_each is None else nodes.gpus_each
        like = (self.gpu_bytes or (PLANNED_GPU_BYTES,))[0]
        return replace(
            self,
            cores=self.cores * nodes.count,
            memory_bytes=self.memory_bytes * nodes.count,
            gpu_bytes=(like,) * each * nodes.count,
            own_cores=(),
        )

    def with_planned_gpus(self, gpus: int) -> Machine:
        """This machine as if it had so many GPUs of 80 GB, and cores of which nothing is known but their
        number."""
        return replace(self, gpu_bytes=(PLANNED_GPU_BYTES,) * gpus, own_cores=())


def probe() -> Machine:
    """Look at this machine, and at what its container leaves of it."""
    import torch

    on_linux = sys.platform == "linux"
    allowed = tuple(sorted(os.sched_getaffinity(0))) if on_linux else ()
    memory_bytes = psutil.virtual_memory().total
    limits = container_limits()
    cores = limits.cores(allowed)
    return Machine(
        cores=cores,
        memory_bytes=min(memory_bytes, limits.memory_bytes or memory_bytes),
        gpu_bytes=tuple(
            torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())
        ),
        shared_memory_bytes=psutil.disk_usage(str(shared_folder())).free if on_linux else None,
        own_cores=allowed if cores >= len(allowed) else (),
    )
