"""Where engines and trainer ask whose turn it is: `core.colocation` by messages, kept through restarts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from asyncrl.config import Config
from asyncrl.core.colocation import Turns
from asyncrl.liveness.stall import StallWatch
from asyncrl.roles import ROLLOUT, TRAINER, names
from asyncrl.runfiles.store import LedgerStore
from asyncrl.wire import messages as m

TRAINERS_TURN = "trainers_turn"
"""Under this key the store keeps whether it is."""


class Until(Protocol):
    """Look again after every event."""

    def __call__(self, look: Callable[[], bool | None], wait_s: float) -> Awaitable[bool | None]: ...


class TurnsDesk:
    """happened: called after an event. until: what `look` gives once it is not None; None after `wait_s`."""

    def __init__(
        self,
        config: Config,
        store: LedgerStore[Any],
        stalls: StallWatch,
        happened: Callable[[], None],
        until: Until,
    ) -> None:
        self._store = store
        self._stalls = stalls
        self._happened = happened
        self._until = until
        self._ranks = set(names(TRAINER, config.trainer.ranks))
        trainers = store.recall(TRAINERS_TURN) != bytes(1)
        self._engines = names(ROLLOUT, config.rollout.workers)
        self._turns = Turns(self._engines, trainers=trainers)
        stalls.sleeps = self.sleeps

    def lost(self, worker: str) -> None:
        self._turns.lost(worker)

    def sleeps(self, role: str) -> bool:
        """An engine that dies in the trainer's turn comes up in its own."""
        return self._turns.is_trainers and role in self._engines and role not in self._turns.awake

    def reads_weights(self, worker: str) -> bool:
        """One whose engine has given up its memory takes the newest version when it gets it back."""
        return worker in self._turns.awake

    def may_ask(self, name: str, request: m.Request) -> bool:
        """Each rank of the trainer waits for the engines' memory before it loads a model."""
        return isinstance(request, m.TrainerTurn) and request.wants and name in self._ranks

    async def answer(self, name: str, request: m.EngineTurn | m.TrainerTurn) -> m.Turn:
        if isinstance(request, m.EngineTurn):
            return await self._of_engine(name, request)
        return await self._of_trainer(name, request)

    async def _of_engine(self, name: str, request: m.EngineTurn) -> m.Turn:
        self._turns.engine(name, (request.process, request.number), awake=request.awake)
        self._happened()

        def changes() -> bool | None:
            yours = self._turns.engine_may(name)
            return yours if yours != request.awake else None

        found = await self._until(changes, request.wait_s)
        return m.Turn(request.awake if found is None else found)

    async def _of_trainer(self, name: str, request: m.TrainerTurn) -> m.Turn:
        """An engine that does not give up its memory holds up the step: a stall, whose culprit is
        replaced."""
        self._turns.trainer(name, (request.process, request.number), wants=request.wants)
        self._store.keep(TRAINERS_TURN, bytes([self._turns.is_trainers]))
        self._happened()

        def may() -> bool | None:
            self._stalls.behind = self._turns.awake
            return self._turns.trainer_may or None

        try:
            return m.Turn(bool(request.wants and await self._until(may, request.wait_s)))
        finally:
            self._stalls.behind = ()
