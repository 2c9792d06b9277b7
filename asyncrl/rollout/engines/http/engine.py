"""Running vLLM servers behind the `Engine` protocol."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from asyncrl.errors import RunFailed
from asyncrl.rollout.engine import EngineError, EngineStats, GenerationRequest, TokenChunk, UpdateReport
from asyncrl.rollout.engines.http import wire
from asyncrl.rollout.engines.http.client import Client, ServerError, open_session
from asyncrl.rollout.engines.http.dispatcher import Dispatcher
from asyncrl.rollout.engines.http.facts import Needs
from asyncrl.rollout.engines.http.router import Router
from asyncrl.rollout.engines.http.server import Server, ServerSettings, Staged
from asyncrl.rollout.engines.http.weights_dir import WeightsDir
from asyncrl.rollout.engines.requests import refuse_impossible
from asyncrl.rollout.engines.streams import Streams
from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
from asyncrl.weights.canary import CanaryError
from asyncrl.weights.manifest import Manifest
from asyncrl.weights.source import WeightSource

log = logging.getLogger(__name__)

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


class HttpEngine:
    """`Engine` over servers that somebody else operates, by their token-in/token-out endpoint and their
    routes for reinforcement learning.

    A request's output comes as one chunk when it ends. Log-probabilities and token versions are those that
    the servers stamp. A server that fails gives its requests to the others, which begin them anew; it
    serves again once it has the newest weights.

    urls: of the servers.
    weights_dir: where they find weight versions.
    expected: what a weight version must look like.
    dtype: what the servers must compute in, by torch's name.
    capacity: requests on all servers together.
    max_length: longest prompt plus output, in tokens.
    group_size: requests with equal prompts that come together.
    kv_on_update: on a weight update, `keep` the running requests' keys and values or `recompute` them.
        Prompts are never shared across versions in either case.
    stop_token_ids: end every request, besides its own.
    """

    def __init__(
        self,
        urls: Sequence[str],
        weights_dir: WeightsDir,
        expected: ExpectedWeights,
        *,
        dtype: str,
        capacity: int,
        max_length: int,
        group_size: int = 1,
        kv_on_update: Literal["keep", "recompute"] = "keep",
        stop_token_ids: tuple[int, ...] = (),
        version: int = 0,
        api_key: str | None = None,
        deadlines: Deadlines | None = None,
        report_every_tokens: int = 16,
    ) -> None:
        self.capacity = capacity
        self._urls = urls
        self._weights_dir = weights_dir
        self._expected = expected
        self._max_length = max_length
        self._stop_token_ids = stop_token_ids
        self._version = version
        self._api_key = api_key
        self._deadlines = deadlines or Deadlines()
        self._settings = ServerSettings(
            wire.Identity(),
            Needs(dtype, max_length),
            kv_on_update,
            report_every_tokens,
            self._deadlines.stall_timeout_s,
        )
        self._session: aiohttp.ClientSession | None = None
        self._streams = Streams(self.abort)
        self._dispatcher = Dispatcher(
            Router(slack=group_size),
            capacity=capacity,
            abort_timeout_s=self._deadlines.answer_timeout_s,
            deliver=self._deliver,
            refused=self._refused,
        )
        self._tasks: set[asyncio.Task[Any]] = set()
        self._staged: Staged | None = None
        self._updating = asyncio.Lock()
        self._broken: EngineError | RunFailed | None = None
        self._breaking = asyncio.Event()
        self._busy_s = 0.0
        self._busy_since: float | None = None

    async def run(self) -> None:
        """Watch over the servers. Raises `NoServerLeft` when there has been none for `patience_s`,
        `CanaryError`, and `EngineError` when a request is refused or the engine closed."""
        self._connect()
        watches = [self._spawn(self._watch(server), f"watch {server.url}") for server in self.servers]
        last_up_s = time.monotonic()
        try:
            while self._broken is None:
                if self._any_up or self._staged is None or self._updating.locked():
                    last_up_s = time.monotonic()
                elif time.monotonic() - last_up_s > self._deadlines.patience_s:
                    self._break(self._none_left())
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._breaking.wait(), POLL_S)
        finally:
            for watch in watches:
                watch.cancel()
        raise self._broken

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Queues the request at once, not at the first iteration; it runs whether or not somebody iterates.
        Cancelling or closing the iteration aborts it."""
        if self._broken is not None:
            raise self._broken
        self._streams.refuse_duplicate(request.request_id)
        refuse_impossible(request, self._expected.vocab_size, self._max_length)
        stream = self._streams.open(request.request_id)
        self._dispatcher.submit(request, self._stop_ids(request))
        self._mark_busy()
        return stream

    def abort(self, request_id: str) -> None:
        self._dispatcher.abort(request_id)

    async def update_weights(self, source: WeightSource) -> UpdateReport:
        """Written as a file beside the decoding, then loaded by all servers at the same time, each in a
        pause of its own. A server that cannot take the version is left out until it can. Updates that
        overlap are applied one after the other. A version that does not fit or match its checksum raises
        `WeightsError` and changes nothing. Raises `CanaryError`, and breaks, when a server turns out to
        compute something else than the trainer, and `NoServerLeft` when none is left; no output of these
        weights has been delivered then."""
        async with self._updating:
            if self._broken is not None:
                raise self._broken
            self._connect()
            started = time.perf_counter()
            staging = self._spawn(asyncio.to_thread(self._stage, source), f"{_SWAP} stage")
            staged = await asyncio.shield(staging)
            stage_s = time.perf_counter() - started
            before, self._staged = self._staged, staged
            wanted = [server for server in self.servers if server.up] or self.servers
            # Not to be given up half-way, whoever waits for it.
            swaps = [self._spawn(self._swap(server), f"{_SWAP} {server.url}") for server in wanted]
            pauses_s = await asyncio.shield(asyncio.gather(*swaps))
            await self._await_a_server()
            self._version = source.version
            if before is not None:
                await asyncio.to_thread(self._weights_dir.drop, before.folder)
            return UpdateReport(source.version, stage_s, max(pauses_s))

    @property
    def servers(self) -> list[Server]:
        """Empty before the first update."""
        return self._dispatcher.servers

    async def hold(self) -> None:
        """Stop decoding between two steps until `release`; requests stay, updates go on."""
        for server in self.servers:
            await server.hold()

    async def release(self) -> None:
        for server in self.servers:
            await server.release()

    def stats(self) -> EngineStats:
        busy_s = self._busy_s
        if self._busy_since is not None:
            busy_s += time.perf_counter() - self._busy_since
        d = self._dispatcher
        return EngineStats(self._version, d.running, d.waiting, d.generated_tokens, busy_s)

    async def close(self) -> None:
        """End `run` and every pending stream with `EngineError`. The servers go on, without this engine's
        requests. May be called more than once."""
        if self._broken is None:
            self._break(EngineError("the engine was closed"))
        self._dispatcher.close()
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

    # ---- servers -------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Once, in the event loop."""
        if self._session is not None:
            return
        session = self._session = open_session(self._api_key)
        d = self._deadlines
        for url in self._urls:
            client = Client(
                url, session, answer_timeout_s=d.answer_timeout_s, load_timeout_s=d.load_timeout_s
            )
            self.servers.append(Server(client, self._settings, self._dispatcher))

    async def _watch(self, server: Server) -> None:
        """Notice when a server fails, and when it is back."""
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

    @property
    def _any_up(self) -> bool:
        return any(server.up for server in self.servers)

    def _stage(self, source: WeightSource) -> Staged:
        tensors = source.tensors()
        self._expected.refuse_other(Manifest.of(tensors))
        folder = self._weights_dir.write(source.version, self._expected.with_tied(tensors))
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
                    raise self._break(error) from error
        return 0.0

    async def _await_a_server(self) -> None:
        """Servers that only hang or are being started may come back, by `run`."""
        deadline = time.monotonic() + self._deadlines.patience_s
        while not self._any_up:
            if all(server.refuses for server in self.servers) or time.monotonic() > deadline:
                raise self._break(self._none_left())
            await asyncio.sleep(POLL_S)

    def _none_left(self) -> NoServerLeft:
        troubles = "\n".join(f"  {server.trouble}" for server in self.servers)
        return NoServerLeft(f"rollout.http.urls: no server can be used:\n{troubles}")

    # ---- requests ------------------------------------------------------------------------------------------

    def _stop_ids(self, request: GenerationRequest) -> list[int]:
        """Ids beyond the vocabulary can never be sampled, and vLLM refuses them."""
        ids = {*self._stop_token_ids, *request.sampling.stop_token_ids}
        return sorted(i for i in ids if i < self._expected.vocab_size)

    def _deliver(self, request_id: str, chunk: TokenChunk) -> None:
        if self._broken is None:
            self._streams.end(request_id, chunk)
        self._mark_busy()

    def _refused(self, error: ServerError) -> None:
        self._break(EngineError(str(error)))

    def _spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _break(self, reason: EngineError | RunFailed) -> EngineError | RunFailed:
        if self._broken is None:
            self._broken = reason
            self._streams.fail(str(reason))
            self._breaking.set()
            self._mark_busy()
        return self._broken

    def _mark_busy(self) -> None:
        """Keep the clock of the time with requests running or about to run."""
        busy = self._broken is None and bool(self._dispatcher.running or self._dispatcher.waiting)
        if busy and self._busy_since is None:
            self._busy_since = time.perf_counter()
        elif not busy and self._busy_since is not None:
            self._busy_s += time.perf_counter() - self._busy_since
            self._busy_since = None
