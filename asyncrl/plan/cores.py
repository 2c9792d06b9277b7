"""Cores of their own for the processes that compute on the CPU. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from asyncrl.config import Config
from asyncrl.plan.resources import Place, Placement
from asyncrl.rollout.engines.spec import engine_of
from asyncrl.trainer.backend import backend_of


def cores_wanted(config: Config, placement: Placement) -> dict[str, int]:
    """A core for each thread that a role computes with on the CPU; roles that only wait, or compute on GPUs,
    want none, nor does a run in one process."""
    if config.run.in_one_process:
        return {}
    return {
        place.role: place.threads * _processes(config, place)
        for place in placement.places
        if not place.gpus and _computes(config, place)
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


def _computes(config: Config, place: Place) -> bool:
    if place.kind == "trainer":
        return backend_of(config).computes
    return place.kind != "rollout" or engine_of(config).computes_here


def _processes(config: Config, place: Place) -> int:
    """vLLM splits a model over processes, each with the engine's number of threads."""
    return config.rollout.tensor_parallel_size if place.kind == "rollout" else 1
