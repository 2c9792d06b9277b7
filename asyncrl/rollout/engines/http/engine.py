"""Running vLLM servers behind the `Engine` protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Literal

from asyncrl.errors import RunFailed
from asyncrl.rollout.engines.base import EngineError, EngineStats, GenerationRequest, TokenChunk, UpdateReport
from asyncrl.rollout.engines.http import wire
from asyncrl.rollout.engines.http.client import ServerError
from asyncrl.rollout.engines.http.dispatcher import Dispatcher
from asyncrl.rollout.engines.http.facts import Needs
from asyncrl.rollout.engines.http.fleet import POLL_S, Deadlines, Fleet
from asyncrl.rollout.engines.http.router import Router
from asyncrl.rollout.engines.http.server import Server, ServerSettings
from asyncrl.rollout.engines.http.weights_dir import WeightsDir
from asyncrl.rollout.engines.requests import refuse_impossible
from asyncrl.rollout.engines.streams import Streams
from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
from asyncrl.weights.source import WeightSource


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
        self._expected = expected
        self._max_length = max_length
        self._stop_token_ids = stop_token_ids
        deadlines = deadlines or Deadlines()
        self._patience_s = deadlines.patience_s
        self._streams = Streams(self.abort)
        self._dispatcher = Dispatcher(
            Router(slack=group_size),
            capacity=capacity,
            abort_timeout_s=deadlines.answer_timeout_s,
            deliver=self._deliver,
            refused=self._refused,
        )
        self._fleet = Fleet(
            urls,
            ServerSettings(
                wire.Identity(),
                Needs(dtype, max_length, expected.has_experts),
                kv_on_update,
                report_every_tokens,
                deadlines.stall_timeout_s,
            ),
            weights_dir,
            expected,
            self._dispatcher,
            api_key=api_key,
            deadlines=deadlines,
            version=version,
            broken=self._break,
        )
        self._updating = asyncio.Lock()
        self._broken: EngineError | RunFailed | None = None
        self._breaking = asyncio.Event()
        self._busy_s = 0.0
        self._busy_since: float | None = None

    async def run(self) -> None:
        """Watch over the servers. Raises `NoServerLeft` when there has been none for `patience_s`,
        `CanaryError`, and `EngineError` when a request is refused or the engine closed."""
        fleet = self._fleet
        fleet.connect()
        watching = asyncio.create_task(fleet.watch(), name="watch over the servers")
        last_up_s = time.monotonic()
        try:
            while self._broken is None:
                if fleet.any_up or not fleet.has_weights or self._updating.locked():
                    last_up_s = time.monotonic()
                elif time.monotonic() - last_up_s > self._patience_s:
                    self._break(fleet.none_left())
                if watching.done():
                    watching.result()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._breaking.wait(), POLL_S)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
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
            return await self._fleet.update(source)

    @property
    def servers(self) -> list[Server]:
        """Empty before the first update."""
        return self._fleet.servers

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
        return EngineStats(self._fleet.version, d.running, d.waiting, d.generated_tokens, busy_s)

    async def close(self) -> None:
        """End `run` and every pending stream with `EngineError`. The servers go on, without this engine's
        requests. May be called more than once."""
        if self._broken is None:
            self._break(EngineError("the engine was closed"))
        self._dispatcher.close()
        await self._fleet.close()

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
