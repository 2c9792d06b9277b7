"""What the machine has, and which role computes where."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Literal

import psutil

from asyncrl.config import Config, RewardModelConfig
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
    """`trainer`, `rollout-N` or `reward-N`."""
    device: Literal["cpu", "cuda"]
    gpu: int | None
    """Index of its GPU among the visible ones, None on the CPU."""
    threads: int
    """CPU threads that it computes with."""


@dataclass(frozen=True, slots=True)
class Placement:
    trainer: Place
    rollout: tuple[Place, ...]
    reward: tuple[Place, ...] = ()
    """Of the reward models."""
    idle_gpus: int = 0
    """GPUs that were asked for and that nothing uses."""

    @property
    def places(self) -> tuple[Place, ...]:
        return (self.trainer, *self.rollout, *self.reward)

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


def visible_gpu(index: int) -> str:
    """The name in `CUDA_VISIBLE_DEVICES` of the GPU that is this process's number `index`."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)


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
    models = config.reward.models
    devices = {"trainer.device": trainer_device, "rollout.device": rollout_device}
    devices |= {f"reward.models.{i}.device": model.device for i, model in enumerate(models)}
    for key, device in devices.items():
        if device == "cuda" and not usable:
            reason = "--gpus 0 allows none" if available else "this machine has no GPU that CUDA can use"
            raise ConfigError(f"{key}=cuda: {reason}; use {key}=auto or {key}=cpu")
    if asked and set(devices.values()) == {"cpu"}:
        raise ConfigError(
            f"--gpus {asked}: no role would use a GPU: all are set to the CPU, or paced; set "
            "trainer.device=auto or rollout.device=auto, or leave --gpus out"
        )
    own = sum(model.device != "cpu" and model.share_gpu_with is None for model in models)
    free = _gpus_for(config.rollout.workers, trainer_device != "cpu", rollout_device != "cpu", own, usable)

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
    placement = replace(placement, reward=tuple(_reward_places(models, placement, place)))
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


def _reward_places(
    models: Sequence[RewardModelConfig], others: Placement, place: Callable[[str, str, int], Place]
) -> Iterator[Place]:
    """Each model on a GPU of its own, or on that of the process it shares with, or on the CPU."""
    theirs = {other.role: other for other in others.places}
    for i, model in enumerate(models):
        role = f"reward-{i}"
        if model.share_gpu_with is None or model.device == "cpu":
            yield place(role, model.device, model.threads)
            continue
        shared = theirs[model.share_gpu_with]
        if shared.gpu is None and model.device == "cuda":
            raise ConfigError(
                f"reward.models.{i}.share_gpu_with={model.share_gpu_with}: that process computes on the CPU; "
                f"leave it out, or use reward.models.{i}.device=auto"
            )
        yield replace(shared, role=role, threads=model.threads)


def _gpus_for(
    workers: int, trainer_wants: bool, rollout_wants: bool, models: int, usable: int
) -> Iterator[int]:
    """The GPUs for the roles that want one, in turn: one each, or the only one for all."""
    needed = trainer_wants + workers * rollout_wants + models
    if usable <= 1:
        return repeat(0, needed * usable)
    if needed > usable:
        left = usable - trainer_wants - models
        remedy = f"use rollout.workers={left}, or " if left > 0 else "use "
        raise ConfigError(
            f"rollout.workers={workers}: {needed} GPUs are needed, one for each worker"
            f"{' and one for the trainer' * trainer_wants}{' and one for each reward model' * (models > 0)}, "
            f"and there are {usable}; {remedy}--gpus 1 to let all share one"
        )
    return iter(range(needed))
