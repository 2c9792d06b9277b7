"""Which role computes where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, repeat
from typing import Literal

from asyncrl.config import Config
from asyncrl.errors import ConfigError, NotHereError


@dataclass(frozen=True, slots=True)
class Place:
    """Where one role computes."""

    role: str
    """Name of its process: `trainer-N`, `rollout-N` or `reward-N`."""
    device: Literal["cpu", "cuda"]
    gpus: tuple[int, ...]
    """Indices of its GPUs among the visible ones; none on the CPU."""
    threads: int
    """CPU threads that it computes with."""
    cores: tuple[int, ...] = ()
    """Those that it stays on, and nobody else does; none: the system's choice."""

    @property
    def kind(self) -> str:
        return kind_of(self.role)


def kind_of(role: str) -> str:
    """What equal processes have in common: `rollout` of `rollout-1`. Each reward model is a kind of its
    own."""
    kind = role.partition("-")[0]
    return role if kind == "reward" else kind


@dataclass(frozen=True, slots=True)
class Placement:
    places: tuple[Place, ...]
    """The trainer's ranks, the engines, the reward models."""
    idle_gpus: int = 0
    """GPUs that were asked for and that nothing uses."""

    def of(self, kind: str) -> tuple[Place, ...]:
        """The places of one kind, such as `rollout`."""
        return tuple(place for place in self.places if place.kind == kind)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(place.kind for place in self.places))

    @property
    def used_gpus(self) -> tuple[int, ...]:
        """The GPUs in use, each once."""
        return tuple(sorted({gpu for place in self.places for gpu in place.gpus}))

    @property
    def gpus(self) -> int:
        """GPUs that the run holds."""
        return len(self.used_gpus) + self.idle_gpus

    def on(self, gpu: int) -> tuple[Place, ...]:
        """Who computes on a GPU."""
        return tuple(place for place in self.places if gpu in place.gpus)

    @property
    def shares_gpu(self) -> bool:
        return any(len(self.on(gpu)) > 1 for gpu in self.used_gpus)


@dataclass(frozen=True, slots=True)
class _Need:
    """Equal processes that want to compute somewhere."""

    key: str
    """Section of the settings that they have."""
    roles: tuple[str, ...]
    gpus_each: int
    device: Literal["auto", "cpu", "cuda"]
    threads: int
    settings: str
    """The settings that say how many GPUs they take, with their values."""
    shares_with: str | None = None
    """The role on whose GPUs they compute, instead of on their own."""

    @property
    def gpus(self) -> int:
        """Own ones."""
        return 0 if self.device == "cpu" or self.shares_with else len(self.roles) * self.gpus_each

    @property
    def is_loop(self) -> bool:
        """Whether it generates or trains, and does not only score."""
        return self.key in ("trainer", "rollout")


def assign(config: Config, asked: int | None, available: int) -> Placement:
    """Give every role that computes its device: each its own GPUs, or GPUs that trainer and engines share
    (`placement.colocate`) or a reward model shares with somebody (`share_gpu_with`).

    `asked` is the number of GPUs to use (None: as many as are of use), `available` how many there are. Raises
    `ConfigError` when that cannot be.
    """
    needs = _needs(config)
    usable = _usable(asked, available)
    if config.run.mode == "inline":
        usable = min(usable, 1)  # one process computes everything
    for need in needs:
        if need.device == "cuda" and not usable:
            reason = "--gpus 0 allows none" if available else "this machine has no GPU that CUDA can use"
            raise ConfigError(
                f"{need.key}.device=cuda: {reason}; use {need.key}.device=auto or {need.key}.device=cpu"
            )
    if asked and all(need.device == "cpu" for need in needs):
        raise ConfigError(
            f"--gpus {asked}: no role would use a GPU: all are set to the CPU, or paced; set "
            "trainer.device=auto or rollout.device=auto, or leave --gpus out"
        )
    if not usable:
        needs = [replace(need, device="cpu") for need in needs]
    shared = _are_shared(config, usable)
    _refuse_too_few(config, needs, usable, shared)
    placement = Placement(tuple(_places(needs, usable, shared)))
    return replace(placement, idle_gpus=max(0, (asked or 0) - placement.gpus))


def wanted_gpus(config: Config) -> int:
    """How many GPUs the roles take where there are enough."""
    needs = _needs(config)
    loop = [need.gpus for need in needs if need.is_loop]
    shared = config.placement.colocate == "always" or config.run.mode == "inline"
    return (max(loop) if shared else sum(loop)) + sum(need.gpus for need in needs if not need.is_loop)


def _needs(config: Config) -> list[_Need]:
    trainer, rollout = config.trainer, config.rollout
    engines = f"rollout.workers={rollout.workers}"
    if rollout.tensor_parallel_size > 1:
        engines += f" x rollout.tensor_parallel_size={rollout.tensor_parallel_size}"
    # What is paced only waits, and needs no GPU.
    return [
        _Need(
            key="trainer",
            roles=tuple(f"trainer-{i}" for i in range(trainer.ranks)),
            gpus_each=1,
            device="cpu" if trainer.backend == "paced" else trainer.device,
            threads=trainer.threads,
            settings=f"trainer.ranks={trainer.ranks}",
        ),
        _Need(
            key="rollout",
            roles=tuple(f"rollout-{i}" for i in range(rollout.workers)),
            gpus_each=rollout.tensor_parallel_size,
            device="cpu" if rollout.engine in ("paced", "http") else rollout.device,
            threads=rollout.threads,
            settings=engines,
        ),
        *(
            _Need(
                key=f"reward.models.{i}",
                roles=(f"reward-{i}",),
                gpus_each=1,
                device=model.device,
                threads=model.threads,
                settings=f"reward.models.{i}",
                shares_with="trainer-0" if model.share_gpu_with == "trainer" else model.share_gpu_with,
            )
            for i, model in enumerate(config.reward.models)
        ),
    ]


def _usable(asked: int | None, available: int) -> int:
    """How many GPUs the run may use."""
    if asked is None:
        return available
    if asked < 0:
        raise ConfigError(f"--gpus {asked}: it should be 0 (the CPU only) or more")
    if asked > available:
        raise too_few_gpus(asked, available)
    return asked


def too_few_gpus(wanted: int, available: int) -> NotHereError:
    """What to raise where this machine has fewer GPUs than are wanted."""
    there = "1 GPU" if available == 1 else f"{available or 'no'} GPUs"
    fewer = f"use --gpus {available}" if available else "leave --gpus out to run on the CPU"
    command = f"start it on a machine with {_count(wanted)}"
    return NotHereError(
        f"--gpus {wanted}: this machine has {there} that CUDA can use",
        command=command,
        advice=f"{fewer}, {command}, or add --dry-run to plan for {wanted}",
    )


def _are_shared(config: Config, usable: int) -> bool:
    """Whether the engines start at GPU 0 like the trainer's ranks, instead of after them."""
    if config.run.mode == "inline":
        return True
    colocate = config.placement.colocate
    return colocate == "always" or (colocate == "auto" and usable == 1)


def _refuse_too_few(config: Config, needs: Sequence[_Need], usable: int, shared: bool) -> None:
    if usable == 1 and shared:
        for need in needs:
            # Several processes may compute on a GPU, but not ranks of one trainer or one engine: NCCL refuses
            # them.
            ranks = need.gpus if need.key == "trainer" else min(need.gpus, need.gpus_each)
            if ranks > 1:
                raise ConfigError(f"{need.settings}: {_count(ranks)} are needed, and there is 1; use fewer")
        return
    wanting = [need for need in needs if need.gpus]
    loop = [need.gpus for need in wanting if need.is_loop]
    models = sum(need.gpus for need in wanting if not need.is_loop)
    needed = (max(loop, default=0) if shared else sum(loop)) + models
    if needed <= usable:
        return
    parts = " and ".join(f"{need.gpus} for {need.settings}" for need in wanting)
    remedies = []
    workers, gpus_each = config.rollout.workers, config.rollout.tensor_parallel_size
    others = models if shared else needed - sum(n.gpus for n in wanting if n.key == "rollout")
    room = (usable - others) // gpus_each
    if 0 < room < workers:
        remedies.append(f"use rollout.workers={room}")
    if not shared and len(loop) > 1 and max(loop) + models <= usable:
        colocate = "auto" if usable == 1 else "always"
        remedies.append(f"let trainer and engines share GPUs with placement.colocate={colocate}")
    if models:
        remedies.append("let a reward model share one with its share_gpu_with")
    if not remedies:
        remedies.append("lower trainer.ranks, rollout.workers or rollout.tensor_parallel_size")
    there = "there is 1" if usable == 1 else f"there are {usable}"
    raise ConfigError(f"{_count(needed)} are needed ({parts}), and {there}; {', or '.join(remedies)}")


def _places(needs: Sequence[_Need], usable: int, shared: bool) -> Iterator[Place]:
    placed: dict[str, tuple[int, ...]] = {}
    for need in needs:
        used = {gpu for gpus in placed.values() for gpu in gpus}
        # A single GPU is everybody's.
        free = repeat(0) if usable == 1 else count(0 if shared and need.is_loop else len(used))
        for role in need.roles:
            if need.device == "cpu":
                gpus: tuple[int, ...] = ()
            elif need.shares_with is not None:
                gpus = placed[need.shares_with][:1]
                if not gpus and need.device == "cuda":
                    raise ConfigError(
                        f"{need.key}.share_gpu_with: {need.shares_with} computes on the CPU; leave it out, "
                        f"or use {need.key}.device=auto"
                    )
            else:
                gpus = tuple(islice(free, need.gpus_each))
            placed[role] = gpus
            yield Place(role, "cuda" if gpus else "cpu", gpus, need.threads)


def _count(gpus: int) -> str:
    return f"{gpus} GPU{'s' * (gpus > 1)}"
