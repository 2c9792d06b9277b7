"""Pieces of versions that come along with the way to them, also of one that nobody has heard of yet."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from asyncrl.event_loop import cancelled
from asyncrl.transfer.shelf import NOT_YET_S
from asyncrl.wire import messages as m
from asyncrl.wire.rpc import Frames, RpcClient, RpcError

ANSWER_S = NOT_YET_S + 5.0
MOST_AHEAD = 3
"""Versions that are asked for before they are there. One saves the way there and back; with the others they
come as fast as they are published, where a step is shorter than that."""


class Along:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._pieces: dict[m.PieceId, memoryview] = {}
        self._came: deque[m.Route] = deque()
        """In order, with their pieces."""
        self._asking: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()

    def follow(self, source: RpcClient, host: str) -> None:
        """Have the versions that are to be there next sent as soon as they are."""

        async def ask() -> None:
            with suppress(RpcError):
                answer, frames = await source.request(m.Follow(host), timeout_s=ANSWER_S, queued=True)
                if isinstance(answer, m.Route):
                    self.keep(answer, frames)
                    self._came.append(answer)

        def end(task: asyncio.Task[None]) -> None:
            self._asking.discard(task)
            self._news.set()

        while len(self._asking) + len(self._came) < MOST_AHEAD:
            task = asyncio.create_task(ask(), name="follow weights")
            self._asking.add(task)
            task.add_done_callback(end)

    async def way(self, source: RpcClient, host: str, have: m.PieceId, version: int) -> m.Route | None:
        """From the version that is here to this one or a newer one, by what has come or is on its way; None
        where that does not lead there."""
        route, at = None, have
        while at.version < version:
            while not self._came:
                if not self._asking:
                    return None
                self._news.clear()
                await self._news.wait()  # requests have deadlines
            part = self._came.popleft()
            self.follow(source, host)
            end, _ = part.pieces[-1]
            if end.version <= at.version:
                continue
            if part.base not in (at.identity, None):
                return None  # nor do those that come after it
            if part.base is not None and route is not None:
                part = m.Route([*route.pieces, *part.pieces], None, route.base)
            route, at = part, end
        return route

    def keep(self, route: m.Route, frames: Frames) -> None:
        for (name, size), frame in zip(route.pieces, frames, strict=False):
            if len(frame) == size:
                self._pieces[name] = memoryview(frame)

    def take(self, name: m.PieceId) -> memoryview | None:
        """A piece, if it has come."""
        return self._pieces.pop(name, None)

    def fetched(self, version: int) -> None:
        """The version is here: what came of it and of older ones, and was not taken, is of no more use."""
        for name in [name for name in self._pieces if name.version <= version]:
            del self._pieces[name]

    def forget(self) -> None:
        for task in self._asking:
            task.cancel()
        self._pieces.clear()
        self._came.clear()

    async def close(self) -> None:
        for task in list(self._asking):
            await cancelled(task)
