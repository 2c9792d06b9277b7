"""Whether what computes on a GPU fits into its memory, judged by estimates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from asyncrl.cluster.kinds import set_of
from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.plan.memory.estimate import GpuLoad, Memory
from asyncrl.plan.outline import Outline
from asyncrl.plan.resources import Placement
from asyncrl.roles import ENGINES, ROLLOUT, TRAINER, Role
from asyncrl.rollout.engines.spec import engine_of
from asyncrl.specs import specs_of
from asyncrl.trainer.backend import BackendSpec
from asyncrl.units import format_bytes

ROOM_TO_GENERATE_BYTES = 2 * 10**9
"""The least that an engine needs for keys and values to be worth starting."""
FREE_SHARE = 0.08
"""Of a GPU, so much is to be left over by an estimate that is right within 15% of what it computes."""


def shares(config: Config, implied: Outline) -> None:
    """An engine that takes its share of a GPU whole leaves the others on it what they certainly need, and has
    enough for itself."""
    if (taking := engine_of(config).gpu_share(config)) is None:
        return
    key, share = taking
    for load in implied.gpus:
        others = [role for role in load.roles if set_of(role) not in ENGINES]
        engines = len(load.roles) - len(others)
        if not engines or len(load.roles) == 1:
            continue
        memory = {m.kind: m for m in implied.memory}
        theirs = [memory[set_of(role)] for role in others if set_of(role) in memory]
        sleeps = TRAINER if config.placement.in_turns else None
        taken = engines * memory[ROLLOUT].total_bytes
        certain = (e.asleep_bytes if e.kind == sleeps else e.certain_bytes for e in theirs)
        if taken + sum(certain) <= load.card_bytes:
            continue
        needed = sum(e.asleep_bytes if e.kind == sleeps else e.total_bytes for e in theirs)
        fits = int(20 * (1 - FREE_SHARE - needed / load.card_bytes) / engines) / 20
        beside = (
            f", on which {' and '.join(others)} need{'s' * (len(others) == 1)} about {format_bytes(needed)}"
            if others
            else ""
        )
        take = f"{engines} engines take" if engines > 1 else "the engine takes"
        remedy = _share_remedy(key, fits, load.card_bytes, memory[ROLLOUT])
        raise ConfigError(
            f"{key}={share:g}: {take} {format_bytes(taken)} of the "
            f"{format_bytes(load.card_bytes)} of GPU {load.gpu}{beside}; {remedy}"
        )
    if implied.kv_sequences == 0:
        raise ConfigError(
            f"{key}={share:g}: the engines' share of a GPU holds the weights "
            "and not one sequence of full length; raise it, or rollout.tensor_parallel_size"
        )


def _share_remedy(key: str, fits: float, card_bytes: int, engine: Memory) -> str:
    own = engine.parts.get("weights", 0) + engine.parts.get("workspace", 0)
    if fits * card_bytes > own + ROOM_TO_GENERATE_BYTES:
        return f"use {key}={fits:g} or less, or more GPUs"
    ways = ", or ".join(["use more GPUs or a smaller model", *_saving_memory()])
    return f"that leaves too little for an engine; {ways}"


def _saving_memory() -> list[str]:
    """What trainer backends can do about it."""
    return [way for spec in specs_of(BackendSpec).values() for way in spec.saves_memory]


def warnings(config: Config, placement: Placement, implied: Outline) -> Iterator[str]:
    """What works, or may, and may surprise."""
    if placement.shares_gpu and not config.placement.in_turns:
        yield "several processes share a GPU: each is slower while another computes"
    if placement.idle_gpus:
        yield (
            f"{placement.idle_gpus} of the GPUs asked for stay idle; raise rollout.workers or trainer.ranks "
            "to use them"
        )
    for load in implied.gpus:
        needed, there = format_bytes(load.total_bytes), format_bytes(load.card_bytes)
        roles, remedy = " and ".join(load.roles), _remedy(config, load.roles)
        if load.total_bytes > load.card_bytes:
            yield f"GPU {load.gpu}: about {needed} for {roles}, and it has {there}; {remedy}"
        elif _is_tight(load):
            yield (
                f"GPU {load.gpu}: about {needed} of {there} for {roles}, which leaves less than "
                f"{FREE_SHARE:.0%} for what an estimate misses; {remedy}"
            )


def _is_tight(load: GpuLoad) -> bool:
    """Engines alone on a GPU take what they are told to, and no more."""
    is_estimated = any(set_of(role) not in ENGINES for role in load.roles)
    return is_estimated and load.total_bytes > (1 - FREE_SHARE) * load.card_bytes


def _remedy(config: Config, roles: Sequence[str]) -> str:
    remedies = []
    kinds = set(map(set_of, roles))
    if TRAINER in kinds:
        if not config.trainer.gradient_checkpointing:
            remedies.append("set trainer.gradient_checkpointing=true")
        remedies.append("lower trainer.micro_batch_tokens")
        remedies += _saving_memory()
    if kinds & {*ENGINES}:
        taking = engine_of(config).gpu_share(config)
        remedies.append(f"lower {'rollout.slots' if taking is None else taking[0]}")
    for kind in sorted(kinds - {TRAINER, *ENGINES}):
        remedies.append(f"lower reward.models.{Role.parse(kind).index}.batch_tokens")
    return ", or ".join(remedies)
