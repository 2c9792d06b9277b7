"""Requests and answers over ZMQ (ROUTER/DEALER), and notices from the server; deadlines on every wait.

A request travels as `[id, message, frame...]`, its answer comes back under the same id; notices have the id
0. The client sends without waiting and may have many requests open; the server answers in whatever order it
can.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from asyncrl.errors import AsyncRLError
from asyncrl.runtime.messages import Answer, Notice, Refused, Request

log = logging.getLogger(__name__)

_ENCODER = msgspec.msgpack.Encoder()
_REQUEST = msgspec.msgpack.Decoder(Request)
_ANSWER = msgspec.msgpack.Decoder(Answer)
_NOTICE = msgspec.msgpack.Decoder(Notice)
_NOTICE_ID = 0
_ID_BYTES = 8
_CLOSE_LINGER_MS = 500

Frames = Sequence[bytes]


class RpcError(AsyncRLError):
    """A request was refused, or not answered in time."""


class RpcRefused(RpcError):  # noqa: N818 - says what happened
    """The server answered that it cannot carry out the request."""


class RpcServer:
    """Serves requests with `handler(peer, request, frames) -> (answer, frames)`. Handlers run side by
    side."""

    def __init__(self, handler: Callable[[bytes, Any, Frames], Awaitable[tuple[Any, Frames]]]) -> None:
        self._handler = handler
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        # A restarted worker comes back under its old name, perhaps before the dead connection is noticed.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.LINGER, _CLOSE_LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._running: set[asyncio.Task[None]] = set()
        self.refused_frames = 0
        """Messages that were none of ours."""

    def bind(self) -> str:
        """Bind a free loopback port; returns the endpoint."""
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        return f"tcp://127.0.0.1:{port}"

    async def serve(self) -> None:
        """Serve until cancelled. An exception of a handler other than `RpcError` ends the server: it is a
        defect."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                peer, *parts = await self._socket.recv_multipart()
                try:
                    request_id, request = _request_id(parts[0]), _REQUEST.decode(parts[1])
                except (IndexError, ValueError) as error:  # msgspec's errors are ValueErrors
                    self.refused_frames += 1
                    log.warning("refused a message that is none of ours: %s", error)
                    continue
                tasks.create_task(self._answer(peer, request_id, request, parts[2:]))

    async def notify(self, peer: bytes, notice: Any) -> None:
        await self._socket.send_multipart([peer, _NOTICE_ID.to_bytes(_ID_BYTES), _ENCODER.encode(notice)])

    def close(self) -> None:
        self._socket.close()

    async def _answer(self, peer: bytes, request_id: int, request: Any, frames: Frames) -> None:
        try:
            answer, out = await self._handler(peer, request, frames)
        except RpcError as error:
            answer, out = Refused(str(error)), ()
        await self._socket.send_multipart(
            [peer, request_id.to_bytes(_ID_BYTES), _ENCODER.encode(answer), *out], copy=False
        )


def _request_id(head: bytes) -> int:
    if len(head) != _ID_BYTES:
        raise ValueError(f"a request id has {_ID_BYTES} bytes, not {len(head)}")
    return int.from_bytes(head)


class RpcClient:
    """One peer of an `RpcServer`. Use as an async context manager."""

    def __init__(self, endpoint: str, name: str) -> None:
        self._name = name
        self.on_notice: Callable[[Any], None] | None = None
        """Called with each notice of the server."""
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, _CLOSE_LINGER_MS)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.connect(endpoint)
        self._ids = itertools.count(_NOTICE_ID + 1)
        self._open: dict[int, asyncio.Future[tuple[Any, list[bytes]]]] = {}
        self._heard_s = -math.inf
        self._receiver: asyncio.Task[None] | None = None

    async def __aenter__(self) -> RpcClient:
        self._receiver = asyncio.create_task(self._receive(), name=f"{self._name} receives")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._receiver is not None
        self._receiver.cancel()
        with suppress(asyncio.CancelledError):
            await self._receiver
        self._socket.close()

    async def request(
        self, request: Any, frames: Frames = (), *, timeout_s: float, queued: bool = False
    ) -> tuple[Any, list[bytes]]:
        """Returns the answer and its frames. Raises `RpcRefused`, or `RpcError` when it does not come in
        time.

        queued: the server answers one request after another, so the time runs anew from each of its answers.
        """
        request_id = next(self._ids)
        future = asyncio.get_running_loop().create_future()
        self._open[request_id] = future
        try:
            await self._socket.send_multipart(
                [request_id.to_bytes(_ID_BYTES), _ENCODER.encode(request), *frames], copy=False
            )
            asked_s = time.monotonic()
            while not future.done():
                since_s = max(asked_s, self._heard_s) if queued else asked_s
                left_s = since_s + timeout_s - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError
                await asyncio.wait([future], timeout=left_s)
            answer, out = future.result()
        except TimeoutError:
            raise RpcError(
                f"{self._name} waited {timeout_s:.0f} s for the answer to {type(request).__name__}"
            ) from None
        finally:
            del self._open[request_id]
        if isinstance(answer, Refused):
            raise RpcRefused(answer.reason)
        return answer, out

    def give_up(self, reason: str) -> None:
        """Fail every open request with an `RpcError`: the server is known to be gone."""
        for future in self._open.values():
            if not future.done():
                future.set_exception(RpcError(reason))

    async def _receive(self) -> None:
        while True:
            head, body, *frames = await self._socket.recv_multipart()
            self._heard_s = time.monotonic()
            request_id = int.from_bytes(head)
            if request_id == _NOTICE_ID:
                if self.on_notice is not None:
                    self.on_notice(_NOTICE.decode(body))
                continue
            future = self._open.get(request_id)
            if future is not None and not future.done():
                future.set_result((_ANSWER.decode(body), frames))
