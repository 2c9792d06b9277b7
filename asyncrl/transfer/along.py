"""Pieces of versions that come along with the way to them, also of one that nobody has asked for yet."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from asyncrl.event_loop import cancelled
from asyncrl.transfer.shelf import NOT_YET_S
from asyncrl.wire import messages as m
from asyncrl.wire.rpc import Frames, RpcClient, RpcError

_ANSWER_S = NOT_YET_S + 5.0
_MOST_PAUSED = 63
_MOST_ASKED = 2


class Along:
    """Belongs to one event loop.

    To ask ahead saves a version the way there and back. Where versions take the link longer than steps, what
    comes ahead is overtaken before it can be used; after each such one but the first there is a pause of
    twice as many.
    """

    def __init__(self) -> None:
        self._pieces: dict[m.PieceId, tuple[memoryview, bool]] = {}
        """Each with whether it was asked for ahead."""
        self._asking: set[asyncio.Task[None]] = set()
        self._pause = self._left = 0
        """For so many versions nothing is asked for ahead after the next one that is overtaken; and how many
        of them are left."""

    def ask_ahead(self, source: RpcClient, request: m.Locate) -> None:
        """What comes of it may come at any time, or never."""

        async def ask() -> None:
            with suppress(RpcError):
                answer, frames = await source.request(request, timeout_s=_ANSWER_S)
                if isinstance(answer, m.Route):
                    self.keep(answer, frames, is_ahead=True)

        if not self._left and len(self._asking) < _MOST_ASKED:
            task = asyncio.create_task(ask(), name="ask ahead for weights")
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)

    def keep(self, route: m.Route, frames: Frames, *, is_ahead: bool = False) -> None:
        for (name, size), frame in zip(route.pieces, frames, strict=False):
            if len(frame) == size:
                self._pieces[name] = memoryview(frame), is_ahead

    def take(self, name: m.PieceId) -> memoryview | None:
        """A piece, if it has come."""
        piece, is_ahead = self._pieces.pop(name, (None, False))
        if is_ahead:
            self._pause = 0
        return piece

    def fetched(self, version: int) -> None:
        """The version is here: what came of it and of older ones, and was not taken, is of no more use."""
        unused = [name for name in self._pieces if name.version <= version]
        for name in unused:
            del self._pieces[name]
        if unused:
            self._left, self._pause = self._pause, min(2 * self._pause + 1, _MOST_PAUSED)
        elif self._left:
            self._left -= 1

    def forget(self) -> None:
        self._pieces.clear()

    async def close(self) -> None:
        for task in list(self._asking):
            await cancelled(task)
