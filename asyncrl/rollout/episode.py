"""Episodes: how one member of a group comes about, by one request to the policy or by many.

An episode is given a session, not an engine: it knows neither slots nor weights nor seeds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from asyncrl.rollout.session import Session
from asyncrl.rollout.task import RolloutTask

if TYPE_CHECKING:
    from asyncrl.rollout.episodes.program import Earned

Episode = Callable[[RolloutTask, Any], Awaitable["Earned"]]
"""Carries out a task once, by a `Session` of the kind that it needs: what the policy sampled is there. An
exception fails the attempt, by its `kind` if it has one."""


async def single_turn(task: RolloutTask, session: Session) -> None:
    """One response to the prompt."""
    await session.generate(task.prompt_ids)
