"""Requests and answers over ZMQ (ROUTER/DEALER), and notices from the server; deadlines on every wait.

A request travels as `[id, message, frame...]`, its answer comes back under the same id; notices have the id
0. The client sends without waiting and may have many requests open; the server answers in whatever order it
can.

Any message may be lost: its connection breaks, a process dies. So the client sends a request again and again
until it is answered. The server lets pass what it is working on already, and carries out once more what it
has answered: every request means the same the second time. A server that is started again on the same port,
with the same keys, gets what the one before it has left unanswered.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import resource
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from asyncrl.errors import AsyncRLError
from asyncrl.event_loop import cancelled
from asyncrl.wire.gate import Gate, Refusals
from asyncrl.wire.keys import Endpoint, Keys
from asyncrl.wire.messages import Answer, Malformed, NewWeights, Refused, Request, decode

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 256 << 20
"""Of one frame, either way: the token ids of a group of 67 million tokens. A peer that sends more is cut
off."""
MAX_FRAMES = 64
"""Of a request."""
MAX_OPEN_REQUESTS = 10_000
"""That a server works on at the same time; more are refused."""
OPEN_FILES = 1 << 16
"""That a server's process may have, where the system lets it."""
RESEND_S = 2.0
"""A request that is not answered is sent again after this time, and again."""

_ENCODER = msgspec.msgpack.Encoder()
_REQUEST = msgspec.msgpack.Decoder(Request)
_ANSWER = msgspec.msgpack.Decoder(Answer)
_NOTICE = msgspec.msgpack.Decoder(NewWeights)
_NOTICE_ID = 0
_ID_BYTES = 8
_CLOSE_LINGER_MS = 500
_CRYPTO_BYTES = 1024
"""More than encryption adds to a frame."""
_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
"""As plain numbers: what zmq's own flags take for an operation is half of what a small frame takes."""

_contexts: set[zmq.asyncio.Context] = set()
"""Of servers that are not closed. One that was garbage-collected would block until its sockets are closed."""

Frames = Sequence[bytes | memoryview]


class RpcError(AsyncRLError):
    """A request was refused, or not answered in time."""


class RpcRefused(RpcError):  # noqa: N818 - says what happened
    """The server answered that it cannot carry out the request."""


class _Sender:
    """Sends on a socket of the event loop's, without its futures, which cost more than a small message
    itself."""

    def __init__(self, socket: zmq.asyncio.Socket) -> None:
        self._socket = socket
        self.direct = zmq.Socket.shadow(socket.underlying)
        """The same socket."""
        self._has_sent = False
        """In this turn of the loop."""

    def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """At once. Raises `zmq.Again` where nobody takes it."""
        if self._socket.closed:
            raise zmq.ZMQError(zmq.ENOTSOCK)
        for part in parts[:-1]:
            self.direct.send(part, _MORE, len(part) < zmq.COPY_THRESHOLD)
        self.direct.send(parts[-1], _LAST, len(parts[-1]) < zmq.COPY_THRESHOLD)
        if not self._has_sent:
            self._has_sent = True
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        """Sending may swallow the signal that messages have come: have the other socket look for them."""
        self._has_sent = False
        if not self._socket.closed:
            self._socket.get(zmq.EVENTS)


class RpcServer:
    """Serves requests with `handler(peer, request, frames) -> (answer, frames)`. Handlers run side by
    side."""

    def __init__(self, handler: Callable[[bytes, Any, Frames], Awaitable[tuple[Any, Frames]]]) -> None:
        self._handler = handler
        self._context = zmq.asyncio.Context()  # of its own: so is the gate
        _contexts.add(self._context)
        self._socket = _configured(self._context.socket(zmq.ROUTER))
        self._sender = _Sender(self._socket)
        # A restarted worker comes back under its old name, perhaps before the dead connection is noticed.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._gate: Gate | None = None
        self._open: set[tuple[bytes, bytes]] = set()
        """The requests that are being worked on, by peer and id."""
        self.refused = Refusals("a message", log)
        """Messages that were malformed, or that the handler refused."""
        self.refused_peers = Refusals("a peer", log)
        """Attempts to connect without the run's keys."""

    def bind(
        self, keys: Keys, host: str = "127.0.0.1", advertise: str | None = None, port: int | None = None
    ) -> Endpoint:
        """Listen at the address `host`, for peers with the run's keys only. Returns what they need.

        advertise: the name by which they reach this host, when it is not `host` itself. port: where they
        expect this server; by default a free one. Raises `RpcError` when it is taken.
        """
        _allow_many_peers()
        self._gate = Gate(self._context, self._socket, keys)
        self._socket.setsockopt(zmq.IPV6, int(":" in host))
        if port is None:
            port = self._socket.bind_to_random_port(f"tcp://{_bracketed(host)}")
        else:
            try:
                self._socket.bind(f"tcp://{_bracketed(host)}:{port}")
            except zmq.ZMQError as error:
                raise RpcError(
                    f"cannot listen on port {port} of {host}, where the other processes of the run expect "
                    f"this one: {error}"
                ) from None
        return Endpoint.of(f"tcp://{_bracketed(advertise or host)}:{port}", keys)

    async def serve(self) -> None:
        """Serve until cancelled. An exception of a handler other than `RpcError` ends the server: it is a
        defect."""
        assert self._gate is not None, "bind first"
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._gate.guard())
            tasks.create_task(self._gate.watch(self.refused_peers))
            while True:
                self._receive(await self._socket.recv_multipart(), tasks)
                with suppress(zmq.Again):  # the rest of what has come
                    while True:
                        self._receive(self._sender.direct.recv_multipart(_LAST), tasks)

    def notify(self, peers: Iterable[bytes], notice: Any) -> None:
        parts = _encoded(notice, ())
        for peer in peers:
            self._send(peer, _NOTICE_ID.to_bytes(_ID_BYTES), parts)

    def close(self) -> None:
        if self._gate is not None:
            self._gate.close()
        self._context.destroy(linger=_CLOSE_LINGER_MS)
        _contexts.discard(self._context)

    def _receive(self, message: Sequence[bytes], tasks: asyncio.TaskGroup) -> None:
        peer, *parts = message
        if parts and (peer, parts[0]) in self._open:
            return
        try:
            request_id, request, frames = _parse(parts)
        except Malformed as error:
            self.refused.count(f"from {peer!r}: {error}")
            if parts and len(parts[0]) == _ID_BYTES and parts[0] != bytes(_ID_BYTES):
                self._send(peer, parts[0], _encoded(Refused(str(error)), ()))
            return
        self._open.add((peer, request_id))
        tasks.create_task(self._answer(peer, request_id, request, frames))

    async def _answer(self, peer: bytes, request_id: bytes, request: Any, frames: Frames) -> None:
        try:
            if len(self._open) > MAX_OPEN_REQUESTS:
                raise RpcError(f"more than {MAX_OPEN_REQUESTS} requests are open")
            parts = _encoded(*await self._handler(peer, request, frames))
        except RpcError as error:
            self.refused.count(f"{type(request).__name__} from {peer!r}: {error}")
            parts = _encoded(Refused(str(error)), ())
        finally:
            self._open.discard((peer, request_id))
        self._send(peer, request_id, parts)

    def _send(self, peer: bytes, request_id: bytes, parts: Sequence[bytes]) -> None:
        """It never blocks: there is no limit to what waits to be sent."""
        self._sender.send([peer, request_id, *parts])


def _parse(parts: Sequence[bytes]) -> tuple[bytes, Any, Frames]:
    """A request's id, the request and its frames. Raises `Malformed`."""
    if not 2 <= len(parts) <= 2 + MAX_FRAMES:
        raise Malformed(f"it has {len(parts)} parts; a request has 2, and at most {MAX_FRAMES} frames")
    if len(parts[0]) != _ID_BYTES or parts[0] == bytes(_ID_BYTES):
        raise Malformed(f"a request id has {_ID_BYTES} bytes and is not 0; it has {parts[0][:16]!r}")
    return parts[0], decode(_REQUEST, parts[1]), parts[2:]


def _encoded(message: Any, frames: Frames) -> list[bytes]:
    """What is too large is refused here, where it can be said; on its way it would cut the connection."""
    parts = [_ENCODER.encode(message), *frames]
    if (size := max(map(len, parts))) > MAX_FRAME_BYTES:
        raise RpcError(
            f"{type(message).__name__} has a frame of {size:,} bytes, and at most {MAX_FRAME_BYTES:,} can be "
            "sent; use a smaller rollout.group_size, rollout.max_new_tokens or rollout.top_k"
        )
    return parts


def _configured(socket: zmq.asyncio.Socket) -> zmq.asyncio.Socket:
    socket.setsockopt(zmq.LINGER, _CLOSE_LINGER_MS)
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES + _CRYPTO_BYTES)
    return socket


def _allow_many_peers() -> None:
    """Each peer is an open file. The usual soft limit, made for programs that call select(), is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class RpcClient:
    """One peer of an `RpcServer`. Use as an async context manager."""

    def __init__(self, endpoint: Endpoint, name: str) -> None:
        self._name = name
        self.on_notice: Callable[[Any], None] | None = None
        """Called with each notice of the server."""
        self._socket = _configured(zmq.asyncio.Context.instance().socket(zmq.DEALER))
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint.address))
        self._socket.curve_serverkey = endpoint.server_public.encode()
        self._socket.curve_publickey = endpoint.client_public.encode()
        self._socket.curve_secretkey = endpoint.client_secret.encode()
        self._socket.connect(endpoint.address)
        self._sender = _Sender(self._socket)
        # Never those of another process that had this name before.
        self._ids = itertools.count(_NOTICE_ID + 1 + secrets.randbits(63))
        self._open: dict[int, asyncio.Future[tuple[Any, list[memoryview]]]] = {}
        self._heard_s = -math.inf
        self.round_trip_s = math.inf
        """Of a request that is answered at once, as the last ones were."""
        self._receiver: asyncio.Task[None] | None = None

    async def __aenter__(self) -> RpcClient:
        self._receiver = asyncio.create_task(self._receive(), name=f"{self._name} receives")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._receiver is not None
        try:
            await cancelled(self._receiver)
        finally:
            self._socket.close()

    async def request(
        self, request: Any, frames: Frames = (), *, timeout_s: float, queued: bool = False
    ) -> tuple[Any, list[memoryview]]:
        """Returns the answer and its frames, not copied. Raises `RpcRefused`, or `RpcError` when it does not
        come in time.

        queued: the server answers one request after another, so the time runs anew from each of its answers,
        and the request is sent once: it may well be next but a thousand.
        """
        parts = _encoded(request, frames)
        request_id = next(self._ids)
        future = asyncio.get_running_loop().create_future()
        self._open[request_id] = future
        try:
            asked_s = send_s = time.monotonic()
            while not future.done():
                now_s = time.monotonic()
                deadline_s = timeout_s + (max(asked_s, self._heard_s) if queued else asked_s)
                if now_s >= deadline_s:
                    raise TimeoutError
                if now_s >= send_s:
                    self._check_receiving()
                    await self._send([request_id.to_bytes(_ID_BYTES), *parts], deadline_s - now_s)
                    send_s = math.inf if queued else now_s + RESEND_S
                await asyncio.wait([future], timeout=min(deadline_s, send_s) - now_s)
            answer, out = future.result()
            self.round_trip_s = min(time.monotonic() - asked_s, 1.25 * self.round_trip_s)
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
                future.exception()  # a request that has just been cancelled does not look at it

    async def _send(self, parts: Sequence[bytes | memoryview], timeout_s: float) -> None:
        try:
            self._sender.send(parts)
        except zmq.Again:  # a server that shut it out takes nothing
            async with asyncio.timeout(timeout_s):
                await self._socket.send_multipart(parts, copy=False)

    def _check_receiving(self) -> None:
        assert self._receiver is not None, "use it as an async context manager"
        if self._receiver.cancelled():
            raise RpcError(f"{self._name} has let go of this server")
        if self._receiver.done():
            raise RpcError(f"{self._name} receives no more: {self._receiver.exception()!r}")

    async def _receive(self) -> None:
        try:
            while True:
                self._received(*await self._socket.recv_multipart(copy=False))
        except BaseException as error:
            self.give_up(f"{self._name} receives no more: {error!r}")
            raise

    def _received(self, head: zmq.Frame, body: zmq.Frame, *frames: zmq.Frame) -> None:
        self._heard_s = time.monotonic()
        request_id = int.from_bytes(head.bytes)
        if request_id == _NOTICE_ID:
            if self.on_notice is not None:
                self.on_notice(decode(_NOTICE, body.bytes))
            return
        future = self._open.get(request_id)
        if future is not None and not future.done():
            future.set_result((decode(_ANSWER, body.bytes), [frame.buffer for frame in frames]))
