"""More responses are sampled for a prompt than its group has: which of them belong to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from asyncrl.config import RolloutConfig
from asyncrl.core.records import LeftOut
from asyncrl.curriculum.own import Own, call_own, own
from asyncrl.errors import RunFailed
from asyncrl.reward.score import ResponseReward

Choose = Callable[[int, Sequence[float], Sequence[int], Mapping[str, Any]], list[int]]
"""(size, rewards, tokens, columns): indices of so many members, among responses with these rewards and
lengths to a row with these columns."""


class Asked(Protocol):
    """What a choice knows of a task."""

    @property
    def group_size(self) -> int: ...
    @property
    def columns(self) -> Mapping[str, Any]: ...


class Session(Protocol):
    """What samples a response."""

    @property
    def sampled_tokens(self) -> int: ...
    def cut(self, leave: Callable[[], object]) -> None: ...


class Sampled(Protocol):
    """What a choice knows of a response."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def session(self) -> Session: ...


R = TypeVar("R", bound=Sampled)


class Choice:
    """Of the responses that are sampled for a group, names its members.

    first_done: as soon as enough of them are done, the others are cut short, and `choose` has no choice.
    has_greedy: one, after the members, is sampled greedily, and no group is complete without it.
    """

    def __init__(self, choose: Choose, *, first_done: bool = False, has_greedy: bool = False) -> None:
        self._choose = choose
        self._first_done = first_done
        self._has_greedy = has_greedy

    def enough(self, size: int) -> int:
        """So many sound responses make a group of this size."""
        return size + self._has_greedy

    def is_greedy(self, size: int, index: int) -> bool:
        """Whether the response of this index is to be sampled at temperature 0."""
        return self._has_greedy and index == size

    def race(
        self, size: int, sessions: Sequence[Session], running: Sequence[asyncio.Task[Any]]
    ) -> Callable[[int], bool]:
        """What is to be asked, as each response is done, whether it counts. running: filled later."""
        done: set[int] = set()

        def counts(index: int) -> bool:
            if self._first_done and len(done) == size:
                return False
            done.add(index)
            if self._first_done and len(done) == size:
                for other in set(range(len(sessions))) - done:
                    sessions[other].cut(running[other].cancel)
            return True

        return counts

    def members(
        self,
        task: Asked,
        everybody: Sequence[R],
        scored: Sequence[R],
        scores: Sequence[ResponseReward],
    ) -> tuple[list[R], LeftOut]:
        """The members of a task's group, among those of `everybody` that were scored; at least as many
        were. Raises `RunFailed` where a user's own function makes no choice."""
        rewards, tokens = [score.reward for score in scores], [len(one.token_ids) for one in scored]
        chosen = sorted(self._choose(task.group_size, rewards, tokens, task.columns))
        members = [scored[i] for i in chosen]
        sampled, kept = (sum(r.session.sampled_tokens for r in some) for some in (everybody, members))
        left_out = tuple(reward for i, reward in enumerate(rewards) if i not in chosen)
        return members, LeftOut(sampled - kept, left_out)


def first(
    size: int, rewards: Sequence[float], tokens: Sequence[int], columns: Mapping[str, Any]
) -> list[int]:
    """Those that were scored, as no others were; or all but the last."""
    return list(range(size))


def max_variance(
    size: int, rewards: Sequence[float], tokens: Sequence[int], columns: Mapping[str, Any]
) -> list[int]:
    """Those whose rewards have the greatest variance: some of the lowest with some of the highest (PODS,
    arXiv 2504.13818). Of equal rewards the earlier index is the lower."""
    order = np.argsort(rewards, kind="stable")
    chosen = [np.concatenate([order[:low], order[len(order) - (size - low) :]]) for low in range(size + 1)]
    best = max(chosen, key=lambda some: float(np.var(np.asarray(rewards)[some])))
    return [int(i) for i in best]


CHOICES = {
    "first": Choice(first, first_done=True),
    "max_variance": Choice(max_variance),
    "greedy_baseline": Choice(first, has_greedy=True),
}
"""By the names that `rollout.choose` has for them."""


def own_choice(called: Own) -> Choose:
    def choose(
        size: int, rewards: Sequence[float], tokens: Sequence[int], columns: Mapping[str, Any]
    ) -> list[int]:
        given = {"rewards": list(rewards), "tokens": list(tokens), "size": size}
        chosen = call_own(called, list, columns, **given)
        if len(chosen) != size or sum(i in chosen for i in range(len(rewards))) != size:
            raise RunFailed(
                f"{called.key} `{called.spec}` returned {chosen!r:.100}; it should return {size} different "
                f"indices of {len(rewards)} responses"
            )
        return chosen

    return choose


def make_choice(rollout: RolloutConfig) -> Choice | None:
    """None where no more are sampled than a group has. Raises `ConfigError`."""
    if rollout.sampled == rollout.group_size:
        return None
    return CHOICES.get(rollout.choose) or Choice(own_choice(own("rollout.choose", rollout.choose)))
