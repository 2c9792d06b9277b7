"""Which role computes where: on which GPUs, or on which cores of its own. Pure."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice, repeat
from typing import Literal

from asyncrl.cluster.kinds import RoleSet, role_sets, set_of
from asyncrl.config import Config
from asyncrl.errors import ConfigError, NotHereError
from asyncrl.plan.gpu_needs import are_shared, different_gpus, gpus_needed, remedies
from asyncrl.roles import Role


@dataclass(frozen=True, slots=True)
class Place:
    """Where one role computes."""

    role: str
    """Its name."""
    device: Literal["cpu", "cuda"]
    gpus: tuple[int, ...]
    """Indices of its GPUs among the visible ones of all nodes; none on the CPU."""
    threads: int
    """CPU threads that it computes with."""
    cores: tuple[int, ...] = ()
    """Those that it stays on, and nobody else does; none: the system's choice."""
    node: int = 0
    """The first is the launcher's own."""

    @property
    def kind(self) -> str:
        """What it and its equals are called together: `rollout`, `reward-1`."""
        return set_of(self.role)


@dataclass(frozen=True, slots=True)
class Placement:
    places: tuple[Place, ...]
    """Of all that compute."""
    idle_gpus: int = 0
    """GPUs that were asked for and that nothing uses."""
    nodes: int = 1
    gpus_each: int = 0
    """Of each node, which has the GPUs that come after those of the node before."""

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

    def gpus_on_node(self, place: Place) -> tuple[int, ...]:
        """Indices of its GPUs among those of its node."""
        return tuple(gpu - place.node * self.gpus_each for gpu in place.gpus)

    def on(self, gpu: int) -> tuple[Place, ...]:
        """Who computes on a GPU."""
        return tuple(place for place in self.places if gpu in place.gpus)

    @property
    def shares_gpu(self) -> bool:
        return any(len(self.on(gpu)) > 1 for gpu in self.used_gpus)


def assign(config: Config, asked: int | None, available: int, nodes: int = 1) -> Placement:
    """Give every role that computes its device: each its own GPUs, or GPUs that trainer and engines share
    (`placement.colocate`) or a reward model shares with somebody (`share_gpu_with`).

    `asked` is the number of GPUs to use (None: as many as are of use), `available` how many there are, on
    `nodes` machines with as many each. An engine never spans two of them, and roles without a GPU are dealt
    out to all. Raises `ConfigError` when that cannot be.
    """
    needs = [of for of in role_sets(config) if of.threads]
    usable = _usable(asked, available)
    if config.run.in_one_process:
        usable = min(usable, 1)
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
    if usable % nodes:
        raise ConfigError(
            f"--nodes {nodes} --gpus {usable}: every node has as many GPUs as the others; use "
            f"--gpus {usable - usable % nodes} or --gpus {usable - usable % nodes + nodes}"
        )
    if usable:
        _refuse_too_few(config, needs, asked, usable)
    each = usable // nodes
    places = tuple(_places(needs, usable, are_shared(config, usable), nodes))
    placement = Placement(places, nodes=nodes, gpus_each=each)
    if placement.used_gpus and placement.used_gpus[-1] >= usable:
        raise ConfigError(
            f"rollout.tensor_parallel_size={config.rollout.tensor_parallel_size}: an engine stays on one "
            f"node, and {nodes} nodes of {_count(each)} have no room for all of them; use a size that "
            f"divides {each}, or more nodes"
        )
    return replace(placement, idle_gpus=max(0, (asked or 0) - placement.gpus))


def wanted_gpus(config: Config) -> int:
    """How many GPUs the roles take where there are enough."""
    return gpus_needed(config, sys.maxsize)


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


def _refuse_too_few(config: Config, needs: Sequence[RoleSet], asked: int | None, usable: int) -> None:
    needed = gpus_needed(config, usable)
    if needed <= usable:
        return
    if usable == 1 and are_shared(config, usable):
        settings = next(need.settings for need in needs if different_gpus(config, need) == needed)
        what = f"{settings}: {_count(needed)} are needed"
    else:
        parts = " and ".join(f"{need.gpus} for {need.settings}" for need in needs if need.gpus)
        what = f"{_count(needed)} are needed ({parts})"
    there = "there is 1" if usable == 1 else f"there are {usable}"
    enough = max(needed, gpus_needed(config, usable + 1))  # a single GPU is shared, and two need not be
    more = f"use a machine with {_count(enough)}" if asked is None else f"use --gpus {enough}"
    raise ConfigError(f"{what}, and {there}; {', or '.join([*remedies(config, usable), more])}")


def _places(needs: Sequence[RoleSet], usable: int, shared: bool, nodes: int) -> Iterator[Place]:
    each = max(1, usable // nodes)
    placed: dict[str, tuple[int, ...]] = {}
    ranks = sum(len(need.roles) for need in needs if need.kind.is_unit)
    for need in needs:
        # Engines come after the ranks: of two nodes without GPUs, one trains and the other samples.
        first_node = ranks if need.kind.holds_leases else 0
        used = {gpu for gpus in placed.values() for gpu in gpus}
        # A single GPU is everybody's.
        first = 0 if shared and need.kind.in_loop else max(used, default=-1) + 1
        free = repeat(0) if usable == 1 else count(first)
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
                # Of two nodes; behind the last one there is nothing to be found.
                while gpus[0] // each != gpus[-1] // each and gpus[-1] < usable:
                    gpus = (*gpus[1:], next(free))
            placed[role] = gpus
            index = Role.parse(role).index
            # Ranks talk to their neighbours.
            blocks = index * nodes // max(len(need.roles), nodes)
            in_turn = blocks if need.kind.is_unit else (first_node + index) % nodes
            node = gpus[0] // each if gpus else in_turn
            yield Place(role, "cuda" if gpus else "cpu", gpus, need.threads, node=node)


def _count(gpus: int) -> str:
    return f"{gpus} GPU{'s' * (gpus > 1)}"


def cores_wanted(config: Config, placement: Placement) -> dict[str, int]:
    """A core for each thread that a role computes with on the CPU; roles that only wait, or compute on GPUs,
    want none, nor does a run in one process."""
    if config.run.in_one_process:
        return {}
    on_cpu = {place.role for place in placement.places if not place.gpus}
    return {
        role: of.cores_each
        for of in role_sets(config)
        for role in of.roles
        if role in on_cpu and of.cores_each
    }


def with_own_cores(config: Config, placement: Placement, cores: Sequence[int]) -> Placement:
    """Give each role the cores that it wants (`placement.pin_cores`), where there are enough for all; else
    they all share all. `cores`: those that may be given away."""
    wanted = cores_wanted(config, placement)
    if config.placement.pin_cores == "never" or sum(wanted.values()) > len(cores):
        return placement
    free = iter(cores)
    places = [
        replace(place, cores=tuple(next(free) for _ in range(wanted.get(place.role, 0))))
        for place in placement.places
    ]
    return replace(placement, places=tuple(places))
