"""Trainer and engines that take turns with the memory of the same GPUs (`placement.colocate: turns`). Whose
turn it is, `core/colocation.py` says."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from asyncrl.core.records import Batch
from asyncrl.loop.trainer import TrainerLink
from asyncrl.rollout.engines.base import Engine, SteppedEngine
from asyncrl.states import doing
from asyncrl.waits import waiting
from asyncrl.wire import messages as m
from asyncrl.wire.rpc import RpcClient

if TYPE_CHECKING:
    from torch import Tensor

    from asyncrl.trainer.backend import Trainer
    from asyncrl.weights.canary import Canary
    from asyncrl.weights.published import PublishedWeights

LOOK_S = 0.25
POLL_S = 5.0
"""How long the coordinator may keep a question whose turn it is."""


class TrainerTurns(Protocol):
    """The trainer's way to the engines' memory."""

    async def give_turn(self) -> None:
        """The trainer has given up its own: the engines may take theirs."""

    async def take_turn(self) -> None:
        """Returns once the engines have given up theirs, and will not take it again before `give_turn`."""


class TakesTurns(TrainerLink):
    """A trainer's link for which the trainer gives up its memory before it waits for a batch, and takes it
    back once there is one. Where the next batch is there already it goes on, and nothing is moved."""

    def __init__(self, link: TrainerLink, turns: TrainerTurns, trainer: Trainer, executor: Executor) -> None:
        self._link = link
        self._turns = turns
        self._trainer = trainer
        self._executor = executor

    async def take(self, step: int) -> Batch:
        if (batch := await self._link.ready(step)) is not None:
            return batch
        async with self._engines_turn():
            return await self._link.take(step)

    async def come_to_rest(self) -> None:
        if self._link.decodes_to_rest:
            async with self._engines_turn():
                await self._link.come_to_rest()

    @asynccontextmanager
    async def _engines_turn(self) -> AsyncIterator[None]:
        await self._compute(self._trainer.offload)
        await self._turns.give_turn()
        yield
        with waiting("the engines to give up their memory", state="wait_turn"):
            await self._turns.take_turn()
        await self._compute(self._trainer.reload)

    async def _compute(self, move: Callable[[], None]) -> None:
        with doing("move"):
            await asyncio.get_running_loop().run_in_executor(self._executor, move)

    async def begin(self, version: int) -> int:
        return await self._link.begin(version)

    async def ready(self, step: int) -> Batch | None:
        return await self._link.ready(step)

    async def publish(
        self, version: int, weights: PublishedWeights | None, canary: Canary | None
    ) -> dict[str, float]:
        return await self._link.publish(version, weights, canary)

    async def checkpointed(self, oldest: int) -> None:
        await self._link.checkpointed(oldest)


class TakesWeights(Protocol):
    """The inline link."""

    take_weights: Callable[[int, Mapping[str, Tensor]], None]


class TurnsInside(TrainerTurns):
    """Of the trainer with an engine in its own process, which has no memory to begin with."""

    def __init__(self, link: TakesWeights, engine: SteppedEngine) -> None:
        self._engine = engine
        self._wake = link.take_weights
        self._incoming: tuple[int, dict[str, Tensor]] | None = None
        link.take_weights = self._keep
        engine.give_up_memory()

    def _keep(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """For the engine to wake with."""
        self._incoming = version, {name: tensor.to("cpu") for name, tensor in weights.items()}

    async def give_turn(self) -> None:
        assert self._incoming is not None, "nothing was published"
        self._wake(*self._incoming)

    async def take_turn(self) -> None:
        self._engine.give_up_memory()


class Updates(Protocol):
    """What a worker's link does with weight versions."""

    updating: asyncio.Lock
    """While others hold it, the engine takes no version."""

    async def wake(self) -> bool:
        """Wake the engine with the newest version; whether there was one."""


async def engine_turns(turns: TurnsByMessage, engine: Engine, updates: Updates) -> None:
    """Have the engine sleep while the memory is the trainer's, for ever. It begins with its memory."""
    while True:
        await turns.of_engine(awake=True)
        async with updates.updating:
            with waiting("the engine to give up its memory", state="move"):
                await engine.sleep()
            woken = False
            while not woken:
                with waiting("the trainer to give up its memory", state="wait_turn"):
                    await turns.of_engine(awake=False)
                if not (woken := await updates.wake()):
                    await asyncio.sleep(LOOK_S)  # reports bring the notice of weights that will do


class TurnsByMessage(TrainerTurns):
    """Of a trainer or an engine, by the coordinator. A process has one, which may get another client.
    answer_timeout_s: longest wait for an answer beyond the time that the coordinator may keep it."""

    def __init__(self, client: RpcClient, answer_timeout_s: float) -> None:
        self.client = client
        self._timeout_s = POLL_S + answer_timeout_s
        self._process = secrets.randbits(53)
        self._numbers = itertools.count()

    async def give_turn(self) -> None:
        await self._ask(m.TrainerTurn(*self._stamp(), wants=False, wait_s=0))

    async def take_turn(self) -> None:
        while not await self._ask(m.TrainerTurn(*self._stamp(), wants=True, wait_s=POLL_S)):
            pass  # whom it waits for, the coordinator says (`liveness.stall`)

    async def of_engine(self, *, awake: bool) -> None:
        """Returns once the engine is to change whether it has memory."""
        while await self._ask(m.EngineTurn(*self._stamp(), awake, POLL_S)) == awake:
            pass

    async def _ask(self, request: m.TrainerTurn | m.EngineTurn) -> bool:
        answer, _ = await self.client.request(request, timeout_s=self._timeout_s)
        return answer.yours

    def _stamp(self) -> tuple[int, int]:
        return self._process, next(self._numbers)
