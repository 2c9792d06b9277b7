"""How many GPUs the roles of a run take, and what to change where there are fewer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from asyncrl.cluster.kinds import role_sets
from asyncrl.config import Config
from asyncrl.roles import RANK_0, REWARD, TRAINER


def are_shared(config: Config, usable: int) -> bool:
    """Whether the engines start at GPU 0 like the trainer's ranks, instead of after them."""
    if config.run.in_one_process:
        return True
    colocate = config.placement.colocate
    return colocate == "always" or (colocate == "auto" and usable == 1)


def gpus_needed(config: Config, usable: int) -> int:
    """The fewest GPUs on which the run can compute, were it to compute on up to `usable` ones."""
    sets = role_sets(config)
    if usable == 1 and are_shared(config, usable):
        return max(of.ranks for of in sets)
    loop = [of.gpus for of in sets if of.kind.in_loop]
    own = sum(of.gpus for of in sets if not of.kind.in_loop)
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
        _Way("use {}", _values("rollout.workers", range(rollout.workers - 1, 0, -1))),
        _Way("use {}", _values("rollout.tensor_parallel_size", divisors)),
        _Way("use {}", _values("trainer.ranks", range(trainer.ranks - 1, 0, -1))),
        _Way(
            "let trainer and engines share GPUs with {}",
            _values("placement.colocate", [] if are_shared(config, usable) else [shared]),
        ),
        _Way("let reward models share GPUs with {}", tuple(_sharing(config))),
    ]
    return [way for way in ways if way.changes]


def _values(setting: str, values: Iterable[Any]) -> tuple[_Change, ...]:
    section, _, key = setting.partition(".")
    return tuple(_Change(f"{setting}={value}", {section: {key: value}}) for value in values)


def _sharing(config: Config) -> Iterator[_Change]:
    """One reward model more at a time."""
    sets = role_sets(config)
    hosts = [of.roles[0] for of in sets if of.kind.in_loop and of.device != "cpu"]
    alone = [i for i, of in enumerate(of for of in sets if of.kind.name == REWARD) if of.gpus]
    models, settings = list(config.reward.models), []
    for i in alone if hosts else []:
        host = TRAINER if hosts[0] == RANK_0 else hosts[0]
        models[i] = models[i].model_copy(update={"share_gpu_with": host})
        settings.append(f"reward.models.{i}.share_gpu_with={host}")
        yield _Change(" ".join(settings), {"reward": {"models": list(models)}})
