"""A socket at which a host hands out weights, to peers with the run's keys only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import zmq

from asyncrl.event_loop import cancelled
from asyncrl.wire import messages as m
from asyncrl.wire.addresses import own_address
from asyncrl.wire.keys import Endpoint, Keys
from asyncrl.wire.rpc import Frames, RpcServer

log = logging.getLogger(__name__)


class Serving:
    """Belongs to the event loop in which it is made.

    run: what roles need to reach the coordinator, of which this takes the keys that all have.
    """

    def __init__(self, run: Endpoint, handler: Callable[[Any], Awaitable[tuple[m.Answer, Frames]]]) -> None:
        public, secret = (key.decode("ascii") for key in zmq.curve_keypair())
        keys = Keys(public, secret, run.client_public, run.client_secret)
        self._server = RpcServer(lambda _, request, __: handler(request))
        bind, advertise = own_address(run.address)
        self.peer = m.Peer(self._server.bind(keys, bind, advertise).address, public)
        self._task = asyncio.create_task(self._server.serve(), name="weights serving")
        self._task.add_done_callback(_tell)

    async def close(self) -> None:
        with suppress(Exception):  # told already
            await cancelled(self._task)
        self._server.close()


def _tell(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("no weights are served any more", exc_info=error)
