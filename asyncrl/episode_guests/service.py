"""A guest that carries out episodes: lends processes, each for one episode at a time, to whoever asks first.

What episodes and workers say to each other passes through unread, but for when an episode begins and ends.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec

from asyncrl.affinity import usable_cores
from asyncrl.config import NetworkConfig
from asyncrl.reward.processes import wire
from asyncrl.reward.processes.child import ChildDied, RewardChild
from asyncrl.reward.processes.shared_child import CANCEL_S
from asyncrl.rollout.episodes.processes import Processes
from asyncrl.states import doing
from asyncrl.wire import messages as m
from asyncrl.wire.keys import Endpoint, Keys
from asyncrl.wire.rpc import Frames, RpcError, RpcServer
from asyncrl.work import did_one, working

LOST_S = 15.0
"""An episode of which nobody has wanted to hear for so long is given up. The worker has given the guest up
before that (`link.SILENCE_S`)."""
LOOK_S = 1.0

_REQUEST = msgspec.msgpack.Decoder(wire.Request)


class _Episode:
    """What is told to its process and has come too early, and what it has said that has not been heard."""

    def __init__(self, child: RewardChild) -> None:
        self.child = child
        self.number: int | None = None
        """The worker's, once it has begun."""
        self.death = ""
        self.said: list[bytes] = []
        self.heard = 0
        """Messages before those."""
        self.heard_s = time.monotonic()
        self.news = asyncio.Event()
        self._next = 0
        self._early: dict[int, bytes] = {}

    def tell(self, number: int, frame: bytes) -> None:
        """In the order of the numbers; once where one comes again. Raises `RpcError` for no message."""
        if number >= self._next:
            self._early[number] = frame
        while self._next in self._early:
            told = self._early.pop(self._next)
            if self.number is None:
                self.number = _number_of(told)
            if self.child.alive:
                self.child.tell(told)
            self._next += 1

    def say(self, message: wire.Reply | wire.Notice) -> None:
        self.said.append(wire.frame(message))
        self.news.set()

    async def hear(self, heard: int, wait_s: float) -> list[bytes]:
        """What it has said beyond so many messages. Raises `RpcError` where they are no longer here."""
        self.heard_s = time.monotonic()
        if heard < self.heard:
            raise RpcError(f"{self.heard} messages were heard before, and now {heard}")
        self.said, self.heard = self.said[heard - self.heard :], heard
        if not self.said and not self.death:
            self.news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self.news.wait()
        return self.said


def _number_of(frame: bytes) -> int:
    try:
        play = m.decode(_REQUEST, frame[wire.HEADER_BYTES :])
    except m.Malformed as error:
        raise RpcError(f"what a process is told first is no message: {error}") from None
    if not isinstance(play, wire.Play):
        raise RpcError(f"what a process is told first is Play, and not {type(play).__name__}")
    return play.number


class EpisodeService:
    """Lends `processes` processes for the episode `spec`."""

    def __init__(self, spec: str, processes: int) -> None:
        self._most = processes
        self._processes = Processes(spec)
        self._free: list[RewardChild] = []
        self._busy: dict[RewardChild, _Episode] = {}
        self._has_died = asyncio.Event()
        self._episodes: dict[tuple[bytes, int], _Episode] = {}
        """By who has them carried out, and their number there; until that one leaves them."""
        self._server = RpcServer(self._handle)

    async def start(self) -> None:
        """Start the processes, which import the episode. Raises `ConfigError`, and leaves none behind."""
        try:
            await self._fill()
        except BaseException:
            await self._processes.close()
            raise

    def bind(self, keys: Keys, network: NetworkConfig) -> Endpoint:
        """Listen, for peers with the run's keys; returns what they need."""
        return self._server.bind(keys, network.bind, network.advertise)

    async def run(self) -> None:
        """Lend until cancelled. Raises `ConfigError` where a process cannot be replaced."""
        try:
            with working("episodes"), doing("wait_work"):  # others do it
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._server.serve())
                    tasks.create_task(self._give_up_lost())
                    tasks.create_task(self._replace_dead())
        finally:
            self._server.close()
            await self._processes.close()

    async def _handle(self, peer: bytes, request: Any, frames: Frames) -> tuple[m.Answer, Frames]:
        if not isinstance(request, m.ForEpisode):
            raise RpcError(f"who lends processes has no answer to {type(request).__name__}")
        key = peer, request.episode
        if isinstance(request, m.TakeProcess):
            return (m.Done() if self._take(key) else m.NotYet(is_coming=False)), ()
        if isinstance(request, m.LeaveProcess):
            self._leave(key)
            return m.Done(), ()
        if (episode := self._episodes.get(key)) is None:
            raise RpcError("the episode was given up: nobody wanted to hear of it")
        match request:
            case m.TellProcess():
                episode.tell(request.number, request.frame)
                return m.Done(), ()
            case m.HearProcess():
                said = await episode.hear(request.heard, request.wait_s)
                return m.Heard(episode.death), said
        raise AssertionError(request)

    def _take(self, key: tuple[bytes, int]) -> bool:
        if key in self._episodes:  # its answer was lost
            return True
        child = next((child for child in self._free if child.alive), None)
        if child is None:
            return False
        self._free.remove(child)
        self._busy[child] = self._episodes[key] = _Episode(child)
        return True

    def _leave(self, key: tuple[bytes, int]) -> None:
        episode = self._episodes.pop(key, None)
        if episode is None or self._busy.get(child := episode.child) is not episode:
            return
        if episode.number is None:
            self._free.append(child)
            del self._busy[child]
            return

        def kill() -> None:
            if self._busy.get(child) is episode:
                child.kill()

        if child.alive:
            child.tell(wire.frame(wire.Cancel(episode.number)))
        asyncio.get_running_loop().call_later(CANCEL_S, kill)

    def _said(self, child: RewardChild, message: wire.Reply | wire.Notice) -> None:
        episode = self._busy.get(child)
        is_of_process = isinstance(message, wire.Stuck | wire.Moving)
        if episode is None or not (is_of_process or message.number == episode.number):
            return  # of one that is over, which goes on all the same
        episode.say(message)
        if not isinstance(message, wire.Notice):
            del self._busy[child]
            self._free.append(child)
            did_one()

    def _died(self, child: RewardChild, death: ChildDied) -> None:
        if (episode := self._busy.pop(child, None)) is not None:
            episode.death = str(death)
            episode.news.set()
        else:
            self._free.remove(child)
        self._has_died.set()

    async def _fill(self) -> None:
        at_once = asyncio.Semaphore(usable_cores())

        async def add() -> None:
            async with at_once:
                child = await self._processes.spawn()
            child.on_notice = child.on_reply = partial(self._said, child)
            child.on_death = partial(self._died, child)
            if child.alive:
                self._free.append(child)
            else:
                self._has_died.set()

        missing = self._most - len(self._free) - len(self._busy)
        await asyncio.gather(*(add() for _ in range(missing)))

    async def _replace_dead(self) -> None:
        while True:
            await self._has_died.wait()
            self._has_died.clear()
            await self._fill()

    async def _give_up_lost(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            for key, episode in [*self._episodes.items()]:
                if time.monotonic() - episode.heard_s > LOST_S:
                    self._leave(key)
