"""A rollout worker's way to the processes for episodes that others lend."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Coroutine, Sequence
from typing import Any

from asyncrl.reward.processes.child import Child, ChildDied
from asyncrl.reward.processes.shared_child import Interrupted
from asyncrl.roles import EPISODES, names
from asyncrl.runfiles.followed import POLL_S, Followed, follow
from asyncrl.runfiles.layout import RunDir
from asyncrl.wire import messages as m
from asyncrl.wire.rpc import RpcClient, RpcError

HEAR_S = 1.5
"""A guest says at the latest after this time that there is nothing new, before it is asked once more
(`rpc.RESEND_S`)."""
SILENCE_S = 8.0
"""A guest that does not answer for so long beyond that is gone."""


class GuestProcess(Child):
    """One that has one episode and nothing else. Its guest keeps what it says until that has come here, and
    puts what it is told in order, so a connection that breaks for less than `SILENCE_S` changes nothing."""

    def __init__(self, guest: _Guest, client: RpcClient, episode: int) -> None:
        super().__init__()
        self._guest = guest
        self._client = client
        self._episode = episode
        self._numbers = itertools.count()
        self._death: ChildDied | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._start(self._hear())

    @property
    def alive(self) -> bool:
        return self._death is None

    @property
    def death(self) -> ChildDied:
        assert self._death is not None
        return self._death

    def tell(self, request: bytes) -> None:
        self._start(self._tell(m.TellProcess(self._episode, next(self._numbers), request)))

    def kill(self) -> None:
        self._end(ChildDied("killed"))

    async def _tell(self, message: m.TellProcess) -> None:
        try:
            await self._client.request(message, timeout_s=HEAR_S + SILENCE_S)
        except RpcError as error:
            self._lose(error)

    async def _hear(self) -> None:
        heard = 0
        try:
            while True:
                request = m.HearProcess(self._episode, heard, HEAR_S)
                answer, frames = await self._client.request(request, timeout_s=HEAR_S + SILENCE_S)
                for frame in frames:
                    self.received(bytes(frame))
                heard += len(frames)
                if answer.death:
                    self._end(ChildDied(f"{answer.death}, on {self._guest.role}"))
        except RpcError as error:
            self._lose(error)
        except ValueError as error:
            self._end(ChildDied(f"it sent an invalid reply: {error}"))

    def _lose(self, error: RpcError) -> None:
        lost = Interrupted(f"{self._guest.role} has left, or does not answer: {error}")
        self._end(lost, is_silent=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end(self, death: ChildDied, *, is_silent: bool = False) -> None:
        if self._death is not None:
            return
        self._death = death
        self.fail(death)
        for task in self._tasks:
            task.cancel()
        self._guest.leave(self._client, self._episode, is_silent=is_silent)


class _Guest(Followed):
    def __init__(self, role: str, run_dir: RunDir, worker: str) -> None:
        super().__init__(role, run_dir, worker)
        self.open = 0
        """Processes that it lends."""
        self._is_silent = False
        self._leaving: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        self._is_silent = False

    @property
    def may_lend(self) -> bool:
        return self.client is not None and not self._is_silent

    async def lend(self) -> GuestProcess | None:
        """None where no process is free, or no answer comes: then it is not asked before one does."""
        client, episode = self.client, secrets.randbits(53)
        assert client is not None
        self.open += 1
        try:
            answer, _ = await client.request(m.TakeProcess(episode), timeout_s=SILENCE_S)
        except RpcError:
            self.leave(client, episode, is_silent=True)
            return None
        except asyncio.CancelledError:
            self.leave(client, episode)
            raise
        if isinstance(answer, m.Done):
            return GuestProcess(self, client, episode)
        self.open -= 1
        return None

    def leave(self, client: RpcClient, episode: int, *, is_silent: bool = False) -> None:
        """is_silent: the guest has not answered."""
        self.open -= 1
        if client is self.client:
            self._is_silent |= is_silent
            task = asyncio.create_task(self._tell_of_end(client, episode))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    async def _tell_of_end(self, client: RpcClient, episode: int) -> None:
        """Until it answers, or is gone."""
        while client is self.client:
            try:
                await client.request(m.LeaveProcess(episode), timeout_s=SILENCE_S)
            except RpcError:
                await asyncio.sleep(POLL_S)
            else:
                self._is_silent = False
                return


class EpisodeGuests:
    """All that may join a run, for a worker of that name."""

    def __init__(self, guests: int, run_dir: RunDir, worker: str) -> None:
        self._guests: Sequence[_Guest] = [_Guest(role, run_dir, worker) for role in names(EPISODES, guests)]

    async def follow(self) -> None:
        """For ever: connect to those that have joined, wherever they are."""
        await follow(self._guests)

    async def lend(self) -> GuestProcess | None:
        """A process for one episode, of the guest that has the fewest of this worker's; None where none is
        free."""
        for guest in sorted(self._guests, key=lambda guest: guest.open):
            if guest.may_lend and (process := await guest.lend()) is not None:
                return process
        return None
