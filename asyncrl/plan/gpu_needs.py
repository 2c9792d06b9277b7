"""How many GPUs the roles of a run take, and what to change where there are fewer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from typing import Any

from asyncrl.cluster.kinds import RoleSet, role_sets
from asyncrl.config import Config
from asyncrl.roles import RANK_0, REWARD, TRAINER
from asyncrl.section import with_values

Change = dict[str, Any]
"""New values of some settings, by their keys."""


def are_shared(config: Config, usable: int) -> bool:
    """Whether the engines start at GPU 0 like the trainer's ranks, instead of after them."""
    if config.run.in_one_process:
        return True
    colocate = config.placement.colocate
    return colocate in ("always", "turns") or (colocate == "auto" and usable == 1)


def different_gpus(config: Config, of: RoleSet) -> int:
    """So many of its own GPUs must be different ones. Engines that take turns with a trainer wake together,
    and share none with each other."""
    return of.gpus if config.placement.in_turns and of.kind.holds_leases else of.ranks


def gpus_needed(config: Config, usable: int) -> int:
    """The fewest GPUs on which the run can compute, were it to compute on up to `usable` ones."""
    sets = role_sets(config)
    if usable == 1 and are_shared(config, usable):
        return max(different_gpus(config, of) for of in sets)
    loop = [of.gpus for of in sets if of.kind.in_loop]
    own = sum(of.gpus for of in sets if not of.kind.in_loop)
    return (max(loop) if are_shared(config, usable) else sum(loop)) + own


def remedies(config: Config, usable: int) -> list[str]:
    """Changes of the settings, each of which lets the run compute on `usable` GPUs; where none does alone,
    one of several settings that do together, and leave the fewest GPUs idle."""
    ways = _ways(config, usable)
    alone = [way.phrase.format(_written(fit)) for way in ways if (fit := way.fitting(config, usable))]
    if alone:
        return alone
    for count in range(2, len(ways) + 1):
        found = [best for some in combinations(ways, count) if (best := _together(config, usable, some))]
        if found:
            _, settings = max(found, key=lambda best: best[0])
            return [f"use {settings} together"]
    return []


@dataclass(frozen=True, slots=True)
class _Way:
    """One thing to change, and the values to try: the least change first."""

    phrase: str
    changes: list[Change]

    def fitting(self, config: Config, usable: int) -> Change | None:
        """The least change that lets the run compute on so many GPUs."""
        return next((c for c in self.changes if gpus_needed(with_values(config, c), usable) <= usable), None)


def _written(change: Change) -> str:
    return " ".join(f"{key}={value}" for key, value in change.items())


def _together(config: Config, usable: int, ways: Sequence[_Way]) -> tuple[int, str] | None:
    """The values of all these ways that use the most GPUs of those that there are: how many, and the
    settings."""
    found = []
    for changes in product(*(_halving(way.changes) for way in ways)):
        change = dict(chain.from_iterable(change.items() for change in changes))
        if (needed := gpus_needed(with_values(config, change), usable)) <= usable:
            found.append((needed, _written(change)))
    return max(found, key=lambda fit: fit[0], default=None)


def _halving(changes: list[Change]) -> list[Change]:
    """Some of many: every combination of a few is tried."""
    kept, i = [], 0
    while i < len(changes):
        kept.append(changes[i])
        i = 2 * i + 1
    return kept if changes[-1] in kept else [*kept, changes[-1]]


def _ways(config: Config, usable: int) -> list[_Way]:
    rollout, trainer, evaluation = config.rollout, config.trainer, config.evaluation
    ranks, evaluators = rollout.tensor_parallel_size, evaluation.workers if evaluation else 0
    divisors = [n for n in range(ranks - 1, 0, -1) if not ranks % n]  # the model's heads can be dealt to them
    shared = [] if are_shared(config, usable) else ["auto" if usable == 1 else "always"]
    share = "let trainer and engines share GPUs with {}"
    ways = [
        _Way("use {}", [{"rollout.workers": n} for n in range(rollout.workers - 1, 0, -1)]),
        _Way("use {}", [{"evaluation.workers": n} for n in range(evaluators - 1, 0, -1)]),
        _Way("use {}", [{"rollout.tensor_parallel_size": n} for n in divisors]),
        _Way("use {}", [{"trainer.ranks": n} for n in range(trainer.ranks - 1, 0, -1)]),
        _Way(share, [{"placement.colocate": value} for value in shared]),
        _Way("let reward models share GPUs with {}", list(_sharing(config))),
    ]
    return [way for way in ways if way.changes]


def _sharing(config: Config) -> Iterator[Change]:
    """One reward model more at a time."""
    sets = role_sets(config)
    hosts = [of.roles[0] for of in sets if of.kind.in_loop and of.device != "cpu"]
    change: Change = {}
    for of in sets if hosts else ():
        if of.kind.name == REWARD and of.gpus:
            change |= {f"{of.key}.share_gpu_with": TRAINER if hosts[0] == RANK_0 else hosts[0]}
            yield dict(change)
