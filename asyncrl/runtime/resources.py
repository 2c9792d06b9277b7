"""What the machine has, and which role computes where."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Literal

import psutil

from asyncrl.config import Config
from asyncrl.errors import ConfigError

_SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use of the machine."""

    cores: int
    memory_bytes: int
    gpus: int
    """GPUs that CUDA can use."""
    shared_memory_bytes: int | None
    """Free shared memory; None where it is not limited apart from the memory (macOS)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one role computes."""

    role: str
    """`trainer` or `rollout-N`."""
    device: Literal["cpu", "cuda"]
    gpu: int | None
    """Index of its GPU among the visible ones, None on the CPU."""
    threads: int
    """CPU threads that it computes with."""


@dataclass(frozen=True, slots=True)
class Placement:
    trainer: Place
    rollout: tuple[Place, ...]
    idle_gpus: int = 0
    """GPUs that were asked for and that nothing uses."""

    @property
    def places(self) -> tuple[Place, ...]:
        return (self.trainer, *self.rollout)

    @property
    def gpus(self) -> int:
        """GPUs that the run holds."""
        return len({place.gpu for place in self.places if place.gpu is not None}) + self.idle_gpus

    @property
    def shares_gpu(self) -> bool:
        gpus = [place.gpu for place in self.places if place.gpu is not None]
        return len(set(gpus)) < len(gpus)


def probe() -> Machine:
    """Look at this machine."""
    import torch

    on_linux = sys.platform == "linux"
    cores = len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1
    return Machine(
        cores=cores,
        memory_bytes=psutil.virtual_memory().total,
        gpus=torch.cuda.device_count(),
        shared_memory_bytes=psutil.disk_usage(str(_SHM)).free if on_linux and _SHM.is_dir() else None,
    )


def assign(config: Config, asked: int | None, available: int) -> Placement:
    """Give every role that computes its device. With several GPUs no two roles share one, with a single one
    all do.

    `asked` is the number of GPUs to use (None: as many as are of use), `available` how many there are. Raises
    `ConfigError` when that cannot be.
    """
    # What is paced only waits, and needs no GPU.
    trainer_device = "cpu" if config.trainer.backend == "paced" else config.trainer.device
    rollout_device = "cpu" if config.rollout.engine == "paced" else config.rollout.device
    usable = _usable(asked, available)
    for key, device in (("trainer.device", trainer_device), ("rollout.device", rollout_device)):
        if device == "cuda" and not usable:
            reason = "--gpus 0 allows none" if available else "this machine has no GPU that CUDA can use"
            raise ConfigError(f"{key}=cuda: {reason}; use {key}=auto or {key}=cpu")
    if asked and trainer_device == rollout_device == "cpu":
        raise ConfigError(
            f"--gpus {asked}: no role would use a GPU: trainer and rollout are set to the CPU, or paced; set "
            "trainer.device=auto or rollout.device=auto, or leave --gpus out"
        )
    free = _gpus_for(config.rollout.workers, trainer_device != "cpu", rollout_device != "cpu", usable)

    def place(role: str, device: str, threads: int) -> Place:
        gpu = None if device == "cpu" else next(free, None)
        return Place(role, "cpu" if gpu is None else "cuda", gpu, threads)

    placement = Placement(
        trainer=place("trainer", trainer_device, config.trainer.threads),
        rollout=tuple(
            place(f"rollout-{i}", rollout_device, config.rollout.threads)
            for i in range(config.rollout.workers)
        ),
    )
    used = {place.gpu for place in placement.places if place.gpu is not None}
    return replace(placement, idle_gpus=(asked or len(used)) - len(used))


def _usable(asked: int | None, available: int) -> int:
    """How many GPUs the run may use."""
    if asked is None:
        return available
    if asked < 0:
        raise ConfigError(f"--gpus {asked}: it should be 0 (the CPU only) or more")
    if asked > available:
        count = "1 GPU" if available == 1 else f"{available or 'no'} GPUs"
        remedy = f"use --gpus {available}" if available else "leave --gpus out to run on the CPU"
        raise ConfigError(f"--gpus {asked}: this machine has {count} that CUDA can use; {remedy}")
    return asked


def _gpus_for(workers: int, trainer_wants: bool, rollout_wants: bool, usable: int) -> Iterator[int]:
    """The GPUs for the roles that want one, in turn: one each, or the only one for all."""
    needed = trainer_wants + workers * rollout_wants
    if usable <= 1:
        return repeat(0, needed * usable)
    if needed > usable:
        raise ConfigError(
            f"rollout.workers={workers}: {needed} GPUs are needed, one for each worker"
            f"{' and one for the trainer' * trainer_wants}, and there are {usable}; use rollout.workers="
            f"{usable - trainer_wants}, or --gpus 1 to let all share one"
        )
    return iter(range(needed))
