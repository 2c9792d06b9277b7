"""Who is let in at a server's socket, and what was turned away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import zmq
import zmq.asyncio
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from asyncrl.wire.keys import Keys

LOG_EVERY_S = 10.0
_HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


class Refusals:
    """Counts what was refused, and logs it: the first at once, then a summary now and then, so that nobody
    can fill a disk with complaints."""

    def __init__(self, what: str, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._log = log
        self._clock = clock
        self._next_s = -float("inf")
        self._unlogged = 0
        self.total = 0

    def count(self, why: str) -> None:
        self.total += 1
        if self._clock() < self._next_s:
            self._unlogged += 1
            return
        more = f" ({self._unlogged} more since the last such line)" if self._unlogged else ""
        self._log.warning("refused %s: %s%s", self._what, why[:500], more)
        self._next_s, self._unlogged = self._clock() + LOG_EVERY_S, 0


class Gate:
    """Lets the peers of one run in at `socket`, which must not be bound yet: answers ZeroMQ's requests for
    authentication (ZAP, ZeroMQ RFC 27), which it asks for each connection of its context."""

    def __init__(self, context: zmq.asyncio.Context, socket: zmq.asyncio.Socket, keys: Keys) -> None:
        self._allowed = z85.decode(keys.client_public)
        self._zap = context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")
        socket.curve_server = True
        socket.curve_secretkey = keys.server_secret.encode()
        socket.zap_domain = b"asyncrl"
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody gets in while nobody guards the gate
        self._monitor = socket.get_monitor_socket(_HANDSHAKE_FAILED)

    async def guard(self) -> None:
        """Say, for ever, who may come in."""
        while True:
            _, request_id, _, _, _, mechanism, *credentials = await self._zap.recv_multipart()
            belongs = mechanism == b"CURVE" and credentials == [self._allowed]
            verdict = (b"200", b"OK") if belongs else (b"400", b"not of this run")
            await self._zap.send_multipart([b"1.0", request_id, *verdict, b"", b""])

    async def watch(self, refused: Refusals) -> None:
        """Count, for ever, the peers that did not get in."""
        while True:
            event = parse_monitor_message(await self._monitor.recv_multipart())
            kind = zmq.Event(event["event"]).name.lower().removeprefix("handshake_failed_")
            refused.count(f"its handshake failed ({kind})")

    def close(self) -> None:
        self._monitor.close(linger=0)
        self._zap.close(linger=0)
