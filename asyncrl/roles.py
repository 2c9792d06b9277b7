"""What the processes of a run are called: by their kind and, where there may be several, by a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

COORDINATOR, TRAINER, ROLLOUT, REWARD, JUDGE = "coordinator", "trainer", "rollout", "reward", "judge"
EVALUATION, EPISODES = "evaluation", "episodes"
"""The kinds; what there is to know of each: `asyncrl.cluster.kinds`."""

ENGINES = (ROLLOUT, EVALUATION, JUDGE)
"""Kinds whose processes each have an engine."""

RANK_0 = f"{TRAINER}-0"
"""The rank that speaks for the trainer."""

SUPERVISOR = "supervisor"
"""Who starts them."""

AGENT = "agent"
"""Who runs one of them on another host for the supervisor."""


@dataclass(frozen=True, slots=True)
class Role:
    """One process, by its name: `coordinator`, `rollout-1`."""

    kind: str
    index: int = 0

    @classmethod
    def parse(cls, name: str) -> Self:
        kind, _, index = name.partition("-")
        return cls(kind, int(index or 0))


def scorers(models: int, model: int, guests: int) -> tuple[str, ...]:
    """Who scores by one of a run's reward models: its own process, and after it those that may join. Every
    `REWARD` role is one of the model with its number modulo that of the models."""
    return names(REWARD, models * (1 + guests))[model::models]


def names(kind: str, count: int) -> tuple[str, ...]:
    """Of the first `count` processes of a kind of which there may be several."""
    return tuple(f"{kind}-{i}" for i in range(count))
