"""The servers of an engine, taken together: brought to the newest weights, and back when they fail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from asyncrl.errors import RunFailed
from asyncrl.rollout.engines.base import UpdateReport
from asyncrl.rollout.engines.http.client import Client, ServerError, open_session
from asyncrl.rollout.engines.http.dispatcher import Dispatcher
from asyncrl.rollout.engines.http.server import Server, ServerSettings
from asyncrl.rollout.engines.http.weights_dir import Staged, WeightsDir
from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
from asyncrl.states import doing
from asyncrl.weights.canary import CanaryError
from asyncrl.weights.manifest import Manifest
from asyncrl.weights.source import WeightSource

HEARTBEAT_S = 1.0
REFUSED_AGAIN_S = 10.0
"""Between two tries at a server that is there and cannot be used."""
POLL_S = 0.2
UPDATE_TRIES = 2
CLOSING_S = 3.0
"""Longest wait for swaps to end: a server that is left behind paused serves nobody."""
_SWAP = "swap:"
"""Begins the names of their tasks."""


class NoServerLeft(RunFailed):
    """None of the servers can be used. Starting the worker again would not help."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """See `rollout.http` in the configuration."""

    answer_timeout_s: float = 10.0
    load_timeout_s: float = 60.0
    stall_timeout_s: float = 120.0
    patience_s: float = 120.0


class Fleet:
    """Servers that take their jobs from `dispatcher`, which lists them.

    broken: told of the error that the engine cannot go on after; returns the one that it ends with.
    """

    def __init__(
        self,
        urls: Sequence[str],
        settings: ServerSettings,
        weights_dir: WeightsDir,
        expected: ExpectedWeights,
        dispatcher: Dispatcher,
        *,
        api_key: str | None,
        deadlines: Deadlines,
        broken: Callable[[RunFailed], BaseException],
    ) -> None:
        self.version = 0
        """The newest that servers have."""
        self._urls = urls
        self._settings = settings
        self._weights_dir = weights_dir
        self._expected = expected
        self._dispatcher = dispatcher
        self._api_key = api_key
        self._deadlines = deadlines
        self._broken = broken
        self._session: aiohttp.ClientSession | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._staged: Staged | None = None

    @property
    def servers(self) -> list[Server]:
        """Empty before `connect`."""
        return self._dispatcher.servers

    @property
    def has_weights(self) -> bool:
        """There is a version for servers to take."""
        return self._staged is not None

    @property
    def any_up(self) -> bool:
        return any(server.up for server in self.servers)

    def connect(self) -> None:
        """Once, in the event loop; may be called again."""
        if self._session is not None:
            return
        session = self._session = open_session(self._api_key)
        d = self._deadlines
        for url in self._urls:
            client = Client(
                url, session, answer_timeout_s=d.answer_timeout_s, load_timeout_s=d.load_timeout_s
            )
            self.servers.append(Server(client, self._settings, self._dispatcher))

    async def watch(self) -> None:
        """Notice when a server fails, and when it is back; for ever."""
        async with asyncio.TaskGroup() as watches:
            for server in self.servers:
                watches.create_task(self._watch(server), name=f"watch {server.url}")

    async def update(self, source: WeightSource) -> UpdateReport:
        """See `HttpEngine.update_weights`. One at a time."""
        self.connect()
        started = time.perf_counter()
        staging = self._spawn(asyncio.to_thread(self._stage, source), f"{_SWAP} stage")
        staged = await asyncio.shield(staging)
        stage_s = time.perf_counter() - started
        before, self._staged = self._staged, staged
        wanted = [server for server in self.servers if server.up] or self.servers
        # Not to be given up half-way, whoever waits for it.
        swaps = [self._spawn(self._swap(server), f"{_SWAP} {server.url}") for server in wanted]
        with doing("swap"):
            pauses_s = await asyncio.shield(asyncio.gather(*swaps))
        await self._await_a_server()
        self.version = source.version
        if before is not None:
            await asyncio.to_thread(self._weights_dir.drop, before.folder)
        return UpdateReport(source.version, stage_s, max(pauses_s))

    def none_left(self) -> NoServerLeft:
        """The error that says what is wrong with each."""
        troubles = "\n".join(f"  {server.trouble}" for server in self.servers)
        return NoServerLeft(f"rollout.http.urls: no server can be used:\n{troubles}")

    async def close(self) -> None:
        """The servers go on. May be called more than once."""
        try:
            swaps = {task for task in self._tasks if task.get_name().startswith(_SWAP)}
            if swaps:
                await asyncio.wait(swaps, timeout=CLOSING_S)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._session is not None:
                await self._session.close()
        finally:
            self._weights_dir.close()

    # --------------------------------------------------------------------------------------------------------

    async def _watch(self, server: Server) -> None:
        while True:
            with suppress(TimeoutError):
                patience_s = REFUSED_AGAIN_S if server.refuses and not server.up else HEARTBEAT_S
                await asyncio.wait_for(server.suspected.wait(), patience_s)
            server.suspected.clear()
            if server.up:
                await server.heartbeat()
            elif self._staged is not None:
                with suppress(ServerError, CanaryError):  # the server remembers
                    await asyncio.shield(self._spawn(server.bring(self._newest), f"{_SWAP} {server.url}"))

    def _newest(self) -> Staged:
        assert self._staged is not None
        return self._staged

    def _stage(self, source: WeightSource) -> Staged:
        tensors = source.tensors()
        self._expected.refuse_other(Manifest.of(tensors))
        folder = self._weights_dir.write(source.version, self._expected.as_files(tensors))
        return Staged(source.version, folder, source.canary)

    async def _swap(self, server: Server) -> float:
        """Returns the pause in seconds. A server that cannot be used is no error here."""
        for attempt in range(1, UPDATE_TRIES + 1):
            try:
                return await server.bring(self._newest)
            except ServerError as error:
                if error.status is None:
                    break  # let it come back first
            except CanaryError as error:
                if attempt == UPDATE_TRIES:
                    raise self._broken(error) from error
        return 0.0

    async def _await_a_server(self) -> None:
        """Servers that only hang or are being started may come back, by `watch`."""
        deadline = time.monotonic() + self._deadlines.patience_s
        while not self.any_up:
            if all(server.refuses for server in self.servers) or time.monotonic() > deadline:
                raise self._broken(self.none_left())
            await asyncio.sleep(POLL_S)

    def _spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
