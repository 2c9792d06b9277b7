"""Hands requests to servers, and their outputs back."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

from asyncrl.core.records import FinishReason
from asyncrl.rollout.engines.base import GenerationRequest, TokenChunk
from asyncrl.rollout.engines.http import wire
from asyncrl.rollout.engines.http.client import ServerError
from asyncrl.rollout.engines.http.job import Job
from asyncrl.rollout.engines.http.router import Router
from asyncrl.rollout.engines.http.server import Server

log = logging.getLogger(__name__)

ABORT_AGAIN_S = 0.05
FAILURES_SURVIVED = 2
"""Failures of a server that one request survives. With the next one its attempt has failed, in case it is the
reason."""


class Dispatcher:
    """First come, first served. A request that waits is sent as soon as a server has room for it, and waits
    again when that server has lost it.

    capacity: requests on all servers together. abort_timeout_s: longest wait for a server to end a request.
    deliver: is given each request's id and output, once. refused: is told of a request that no server should
    refuse.
    """

    def __init__(
        self,
        router: Router,
        *,
        capacity: int,
        abort_timeout_s: float,
        deliver: Callable[[str, TokenChunk], None],
        refused: Callable[[ServerError], None],
    ) -> None:
        self.servers: list[Server] = []
        self.capacity = capacity
        self.generated_tokens = 0
        self.refused = refused
        self._router = router
        self._abort_timeout_s = abort_timeout_s
        self._deliver = deliver
        self._serial = itertools.count()
        self._waiting: list[Job] = []
        self._running: dict[str, tuple[Job, Server]] = {}
        self._aborts: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, request: GenerationRequest, stop_token_ids: list[int]) -> None:
        self._waiting.append(Job(request, stop_token_ids, next(self._serial)))
        self.dispatch()

    def abort(self, request_id: str) -> None:
        """What there is of it gets delivered. Unknown ids are ignored."""
        if request_id in self._running:
            job, _ = self._running[request_id]
            if not job.aborting:
                job.aborting = True
                task = asyncio.create_task(self._abort(job), name=f"abort {request_id}")
                self._aborts.add(task)
                task.add_done_callback(self._aborts.discard)
        elif found := [job for job in self._waiting if job.request_id == request_id]:
            self._waiting.remove(found[0])
            self._deliver(request_id, wire.nothing(FinishReason.ABORT))

    def dispatch(self) -> None:
        """Send what there is room for."""
        while self._waiting and len(self._running) < self.capacity:
            with_room = {server.url: server for server in self.servers if server.has_room}
            if not with_room:
                return
            job = self._waiting.pop(0)
            prompt = job.request.prompt_ids.tobytes()
            url = self._router.choose(prompt, {u: server.load for u, server in with_room.items()})
            self._running[job.request_id] = (job, with_room[url])
            with_room[url].start(job)

    def close(self) -> None:
        """Drop everything; nothing is delivered any more."""
        self._waiting.clear()
        for task in self._aborts:
            task.cancel()
        for server in self.servers:
            server.close()

    # ---- what servers report (`server.Owner`) --------------------------------------------------------------

    def count(self, tokens: int) -> None:
        self.generated_tokens += tokens

    def finished(self, job: Job, chunk: TokenChunk) -> None:
        del self._running[job.request_id]
        self._deliver(job.request_id, chunk)
        self.dispatch()

    def lost(self, jobs: Iterable[Job], *, failed: bool) -> None:
        for job in jobs:
            del self._running[job.request_id]
            job.failures += failed
            if job.aborting:
                self._deliver(job.request_id, wire.nothing(FinishReason.ABORT))
            elif job.failures > FAILURES_SURVIVED:
                log.warning("request %s: %d servers have failed on it", job.request_id, job.failures)
                self._deliver(job.request_id, wire.nothing(FinishReason.ERROR))
            else:
                self._waiting.append(job)
        self._waiting.sort(key=lambda job: job.serial)
        self.dispatch()

    def opened(self) -> None:
        self.dispatch()

    # --------------------------------------------------------------------------------------------------------

    async def _abort(self, job: Job) -> None:
        """Servers ignore what they have not heard of yet: ask until it has ended."""
        deadline = time.monotonic() + self._abort_timeout_s
        while (entry := self._running.get(job.request_id)) is not None and entry[0] is job:
            server = entry[1]
            if time.monotonic() > deadline:
                server.drop(job)
                self.finished(job, wire.nothing(FinishReason.ABORT))
                return
            with suppress(ServerError):
                await server.abort(job)
            if job.task is not None:
                await asyncio.wait([job.task], timeout=ABORT_AGAIN_S)
