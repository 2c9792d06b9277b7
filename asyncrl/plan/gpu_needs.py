"""How many GPUs the roles of a run take, and what to change where there are fewer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal

from asyncrl.config import Config
from asyncrl.rollout.engines.spec import engine_of
from asyncrl.trainer.backend import backend_of


@dataclass(frozen=True, slots=True)
class Need:
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
    def ranks(self) -> int:
        """Of its own GPUs, so many must be different ones: NCCL refuses two ranks of a trainer, or of an
        engine, on one. Other processes may share a GPU."""
        return self.gpus if self.key == "trainer" else min(self.gpus, self.gpus_each)

    @property
    def is_loop(self) -> bool:
        """Whether it generates or trains, and does not only score."""
        return self.key in ("trainer", "rollout")


def needs_of(config: Config) -> list[Need]:
    """Of the trainer, the engines and each reward model, in this order."""
    trainer, rollout = config.trainer, config.rollout
    engines = f"rollout.workers={rollout.workers}"
    if rollout.tensor_parallel_size > 1:
        engines += f" x rollout.tensor_parallel_size={rollout.tensor_parallel_size}"
    # What is paced only waits, and needs no GPU.
    return [
        Need(
            key="trainer",
            roles=tuple(f"trainer-{i}" for i in range(trainer.ranks)),
            gpus_each=1,
            device=trainer.device if backend_of(config).computes else "cpu",
            threads=trainer.threads,
            settings=f"trainer.ranks={trainer.ranks}",
        ),
        Need(
            key="rollout",
            roles=tuple(f"rollout-{i}" for i in range(rollout.workers)),
            gpus_each=rollout.tensor_parallel_size,
            device=rollout.device if engine_of(config).computes_here else "cpu",
            threads=rollout.threads,
            settings=engines,
        ),
        *(
            Need(
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


def are_shared(config: Config, usable: int) -> bool:
    """Whether the engines start at GPU 0 like the trainer's ranks, instead of after them."""
    if config.run.in_one_process:
        return True
    colocate = config.placement.colocate
    return colocate == "always" or (colocate == "auto" and usable == 1)


def gpus_needed(config: Config, usable: int) -> int:
    """The fewest GPUs on which the run can compute, were it to compute on up to `usable` ones."""
    needs = needs_of(config)
    if usable == 1 and are_shared(config, usable):
        return max(need.ranks for need in needs)
    loop = [need.gpus for need in needs if need.is_loop]
    own = sum(need.gpus for need in needs if not need.is_loop)
    return (max(loop) if are_shared(config, usable) else sum(loop)) + own


def remedies(config: Config, usable: int) -> list[str]:
    """Changes of the settings, each of which lets the run compute on `usable` GPUs; where none does alone,
    one of several settings that do together, and leave the fewest GPUs idle."""
    ways = _ways(config, usable)
    alone = [way.phrase.format(fit) for way in ways if (fit := way.fitting(config, usable))]
    if alone:
        return alone
    for count in range(2, len(ways) + 1):
        found = [fit for some in combinations(ways, count) if (fit := _together(config, usable, some))]
        if found:
            _, settings = max(found, key=lambda fit: fit[0])
            return [f"use {settings} together"]
    return []


@dataclass(frozen=True, slots=True)
class _Change:
    """New values of some settings, as one writes them, and by section."""

    settings: str
    updates: dict[str, Any]

    def of(self, config: Config) -> Config:
        sections = {
            section: getattr(config, section).model_copy(update=update)
            for section, update in self.updates.items()
        }
        return config.model_copy(update=sections)


@dataclass(frozen=True, slots=True)
class _Way:
    """One thing to change, and the values to try: the least change first."""

    phrase: str
    changes: tuple[_Change, ...]

    def fitting(self, config: Config, usable: int) -> str | None:
        """The least change that lets the run compute on so many GPUs, as one writes it."""
        fits = (c.settings for c in self.changes if gpus_needed(c.of(config), usable) <= usable)
        return next(fits, None)


def _together(config: Config, usable: int, ways: Sequence[_Way]) -> tuple[int, str] | None:
    """The values of all these ways that use the most GPUs of those that there are: how many, and the
    settings."""
    found = []
    for changes in product(*(_halving(way.changes) for way in ways)):
        changed = config
        for change in changes:
            changed = change.of(changed)
        if (needed := gpus_needed(changed, usable)) <= usable:
            found.append((needed, " ".join(change.settings for change in changes)))
    return max(found, key=lambda fit: fit[0], default=None)


def _halving(changes: Sequence[_Change]) -> list[_Change]:
    """Some of many: every combination of a few is tried."""
    kept, i = [], 0
    while i < len(changes):
        kept.append(changes[i])
        i = 2 * i + 1
    return kept if changes[-1] in kept else [*kept, changes[-1]]


def _ways(config: Config, usable: int) -> list[_Way]:
    rollout, trainer = config.rollout, config.trainer
    ranks = rollout.tensor_parallel_size
    divisors = [n for n in range(ranks - 1, 0, -1) if not ranks % n]  # the model's heads can be dealt to them
    shared = "auto" if usable == 1 else "always"
    ways = [
        _Way("use {}", _values("rollout", "workers", range(rollout.workers - 1, 0, -1))),
        _Way("use {}", _values("rollout", "tensor_parallel_size", divisors)),
        _Way("use {}", _values("trainer", "ranks", range(trainer.ranks - 1, 0, -1))),
        _Way(
            "let trainer and engines share GPUs with {}",
            _values("placement", "colocate", [] if are_shared(config, usable) else [shared]),
        ),
        _Way("let reward models share GPUs with {}", tuple(_sharing(config))),
    ]
    return [way for way in ways if way.changes]


def _values(section: str, key: str, values: Iterable[Any]) -> tuple[_Change, ...]:
    return tuple(_Change(f"{section}.{key}={value}", {section: {key: value}}) for value in values)


def _sharing(config: Config) -> Iterator[_Change]:
    """One reward model more at a time."""
    needs = needs_of(config)
    hosts = [need.roles[0] for need in needs if need.is_loop and need.device != "cpu"]
    alone = [i for i, need in enumerate(needs[2:]) if need.gpus]
    models, settings = list(config.reward.models), []
    for i in alone if hosts else []:
        host = "trainer" if hosts[0] == "trainer-0" else hosts[0]
        models[i] = models[i].model_copy(update={"share_gpu_with": host})
        settings.append(f"reward.models.{i}.share_gpu_with={host}")
        yield _Change(" ".join(settings), {"reward": {"models": list(models)}})
