"""Episodes: how one member of a group comes about, by one request to the policy or by many.

An episode is given a session, not an engine: it knows neither slots nor weights nor seeds.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

from asyncrl.errors import ConfigError
from asyncrl.resolve import resolve
from asyncrl.rollout.session import Session
from asyncrl.rollout.task import RolloutTask

Earned = float | Sequence[float] | None
"""An episode's reward, or one for each of its requests, in their order; None where the run's reward functions
and models say."""
Episode = Callable[[RolloutTask, Session], Awaitable[Earned]]
"""Carries out a task once. What the policy sampled is in the session."""


async def single_turn(task: RolloutTask, session: Session) -> None:
    """One response to the prompt."""
    await session.generate(task.prompt_ids)


def make_episode(spec: str | None) -> Episode:
    """The one that `rollout.episode` names; `single_turn` where it names none. Raises `ConfigError`."""
    if spec is None:
        return single_turn
    key = "rollout.episode"
    episode = resolve(spec, what=key)
    call = episode if inspect.isroutine(episode) else type(episode).__call__
    try:
        inspect.signature(episode).bind(None, None)
    except TypeError:
        raise ConfigError(f"{key} `{spec}`: it is called with (task, model), and takes others") from None
    if not inspect.iscoroutinefunction(call):
        raise ConfigError(f"{key} `{spec}`: it must be `async def`, since it awaits the model")
    return cast(Episode, episode)
