"""The kinds of role: how many a run has of each, what they compute on, what their processes run, and what
their end means. Another kind of process is another entry of `KINDS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from asyncrl.config import Config
from asyncrl.roles import (
    COORDINATOR,
    EPISODES,
    EVALUATION,
    JUDGE,
    RANK_0,
    REWARD,
    ROLLOUT,
    TRAINER,
    Role,
    names,
)
from asyncrl.rollout.engines.spec import engine_of
from asyncrl.trainer.backend import backend_of


@dataclass(frozen=True, slots=True)
class RoleSet:
    """Equal processes of a run, and what they want to compute on."""

    key: str
    """Section of the settings that they have."""
    roles: tuple[str, ...]
    max_restarts: int
    """Of each within any hour; of all together where they are one unit."""
    threads: int = 0
    """CPU threads that each computes with; 0: it computes nothing."""
    cores_each: int = 0
    """Cores that each can have for its own where it computes on the CPU, one for each thread of all that it
    starts; 0: it only waits."""
    device: Literal["auto", "cpu", "cuda"] = "cpu"
    gpus_each: int = 1
    settings: str = ""
    """The settings that say how many GPUs they take, with their values."""
    must_be_fresh: bool = False
    """A process of it needs a Python of its own, even without a GPU."""
    shares_with: str | None = None
    """The role on whose GPUs they compute, instead of on their own."""

    @property
    def name(self) -> str:
        return set_of(self.roles[0])

    @property
    def kind(self) -> RoleKind:
        return kind_of(self.roles[0])

    @property
    def gpus(self) -> int:
        """Own ones."""
        return 0 if self.device == "cpu" or self.shares_with else len(self.roles) * self.gpus_each

    @property
    def ranks(self) -> int:
        """Of its own GPUs, so many must be different ones: NCCL refuses two ranks of a trainer, or of an
        engine, on one. Other processes may share a GPU."""
        return self.gpus if self.kind.is_unit else min(self.gpus, self.gpus_each)


@dataclass(frozen=True, slots=True)
class RoleKind:
    """What there is to know of one kind."""

    name: str
    entry: str
    """The coroutine that a process of it runs, as `package.module:name`: it takes the run's settings, the run
    directory and the process's name."""
    sets: Callable[[Config], Iterator[RoleSet]]
    """Those of a run."""
    are_alike: bool = True
    """Whether all of it are one `RoleSet`; else each is one by itself."""
    in_loop: bool = False
    """Whether it generates or trains, so that `placement.colocate` says who shares its GPUs."""
    is_hub: bool = False
    """All others talk to it: they wait `COORDINATOR_START_S` for it at most, and where it dies together with
    others, it is the cause."""
    keeps_place: bool = False
    """Others look for its successor where it was itself."""
    is_unit: bool = False
    """One is nothing without the others: when one dies, all are started again together."""
    may_finish: bool = False
    """A good end is no death: there is no more work for it, or, where it is `RANK_0`, for all."""
    must_start: bool = False
    """One that has never come up, and says why, would not the next time either: a setting is wrong. What
    others need may come yet (memory, a port)."""
    is_needed: bool = True
    """Without one that has died too often, the run ends."""
    holds_leases: bool = False
    """What a dead one had leased goes back at once."""


def _coordinator(config: Config) -> Iterator[RoleSet]:
    yield RoleSet("run", (COORDINATOR,), config.run.max_restarts)


# What computes nothing here only waits, and needs no GPU.


def _ranks(config: Config) -> Iterator[RoleSet]:
    trainer, computes = config.trainer, backend_of(config).computes
    yield RoleSet(
        key="trainer",
        roles=names(TRAINER, trainer.ranks),
        max_restarts=config.run.max_restarts,
        threads=trainer.threads,
        cores_each=trainer.threads if computes else 0,
        device=trainer.device if computes else "cpu",
        settings=f"trainer.ranks={trainer.ranks}",
    )


def _engines(config: Config) -> Iterator[RoleSet]:
    rollout, computes = config.rollout, engine_of(config).computes_here
    settings, size = f"rollout.workers={rollout.workers}", rollout.tensor_parallel_size
    if size > 1:
        settings += f" x rollout.tensor_parallel_size={size}"
    yield RoleSet(
        key="rollout",
        roles=names(ROLLOUT, rollout.workers),
        max_restarts=rollout.max_restarts,
        threads=rollout.threads,
        # An engine splits a model over processes, each with its number of threads.
        cores_each=rollout.threads * size if computes else 0,
        device=rollout.device if computes else "cpu",
        gpus_each=size,
        must_be_fresh=engine_of(config).starts_processes,
        settings=settings,
    )


def _evaluators(config: Config) -> Iterator[RoleSet]:
    """Engines like the others, which no other process needs to go on: they have no cores of their own."""
    if config.evaluation is not None:
        [engines], workers = _engines(config), config.evaluation.workers
        settings = engines.settings.replace(f"{ROLLOUT}.workers={config.rollout.workers}", "")
        yield replace(
            engines,
            roles=names(EVALUATION, workers),
            cores_each=0,
            settings=f"evaluation.workers={workers}{settings}",
        )


def _reward_models(config: Config) -> Iterator[RoleSet]:
    models = config.reward.models
    for i, (role, model) in enumerate(zip(names(REWARD, len(models)), models, strict=True)):
        key, beside = f"reward.models.{i}", model.share_gpu_with
        yield RoleSet(
            key=key,
            roles=(role,),
            max_restarts=model.max_restarts,
            threads=model.threads,
            cores_each=model.threads,
            device=model.device,
            settings=key,
            shares_with=RANK_0 if beside == TRAINER else beside,
        )


def _initial_judges(config: Config) -> Iterator[RoleSet]:
    if any(judge.is_initial for judge in config.reward.judges):
        (engines,) = _engines(config)
        yield replace(engines, roles=names(JUDGE, 1), settings="reward.judges")


_ENTRIES = "asyncrl.cluster.entries"

KINDS = {
    kind.name: kind
    for kind in (
        RoleKind(
            COORDINATOR,
            f"{_ENTRIES}:coordinator",
            _coordinator,
            is_hub=True,
            keeps_place=True,
            must_start=True,
        ),
        RoleKind(
            TRAINER,
            f"{_ENTRIES}:trainer",
            _ranks,
            in_loop=True,
            is_unit=True,
            may_finish=True,
            must_start=True,
        ),
        RoleKind(ROLLOUT, f"{_ENTRIES}:rollout", _engines, in_loop=True, may_finish=True, holds_leases=True),
        RoleKind(
            EVALUATION,
            "asyncrl.evaluation.worker:evaluate_versions",
            _evaluators,
            in_loop=True,
            is_needed=False,
        ),
        RoleKind(REWARD, f"{_ENTRIES}:reward", _reward_models, are_alike=False),
        RoleKind(JUDGE, f"{_ENTRIES}:judge", _initial_judges, keeps_place=True),
        RoleKind(EPISODES, f"{_ENTRIES}:episodes", lambda _: iter(())),  # guests only
    )
}
"""In the order in which they are started, and choose their GPUs."""


def kind_of(role: str) -> RoleKind:
    return KINDS[Role.parse(role).kind]


def set_of(role: str) -> str:
    """What equal processes are called together: `rollout` for `rollout-1`. A reward model is like no
    other."""
    kind = kind_of(role)
    return kind.name if kind.are_alike else role


def role_sets(config: Config) -> list[RoleSet]:
    """All of a run."""
    return [of for kind in KINDS.values() for of in kind.sets(config)]
