"""Running vLLM servers behind the `Engine` protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Literal

from asyncrl.rollout.engines.base import EngineStats, GenerationRequest, TokenChunk, UpdateReport
from asyncrl.rollout.engines.http import wire
from asyncrl.rollout.engines.http.client import ServerError
from asyncrl.rollout.engines.http.dispatcher import Dispatcher
from asyncrl.rollout.engines.http.facts import Needs
from asyncrl.rollout.engines.http.fleet import POLL_S, Deadlines, Fleet
from asyncrl.rollout.engines.http.router import Router
from asyncrl.rollout.engines.http.server import Server, ServerSettings
from asyncrl.rollout.engines.http.weights_dir import WeightsDir
from asyncrl.rollout.engines.streams import StreamingEngine
from asyncrl.rollout.engines.vllm.checkpoint import ExpectedWeights
from asyncrl.weights.source import WeightSource


class HttpEngine(StreamingEngine):
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
    kv_on_update: on a weight update, `keep` keys and values, for the running requests and for later turns of
        their episodes, or `recompute` the running ones'. Other prompts are never shared across versions.
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
        api_key: str | None = None,
        deadlines: Deadlines | None = None,
        report_every_tokens: int = 16,
    ) -> None:
        super().__init__(
            capacity=capacity,
            vocab_size=expected.vocab_size,
            max_length=max_length,
            stop_token_ids=stop_token_ids,
        )
        deadlines = deadlines or Deadlines()
        self._patience_s = deadlines.patience_s
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
            broken=self._break,
        )
        self._updating = asyncio.Lock()

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
                await self._change(POLL_S)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        raise self._broken

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
            self._refuse_broken()
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
        d = self._dispatcher
        return EngineStats(
            self._fleet.version, d.running, d.waiting, d.generated_tokens, self._busy_so_far_s()
        )

    async def close(self) -> None:
        """The servers go on, without this engine's requests."""
        await super().close()
        self._dispatcher.close()
        await self._fleet.close()

    # ---- requests ------------------------------------------------------------------------------------------

    def _submit(self, request: GenerationRequest) -> None:
        self._dispatcher.submit(request, self._stop_ids(request))

    def _has_requests(self) -> bool:
        return bool(self._dispatcher.running or self._dispatcher.waiting)

    def _deliver(self, request_id: str, chunk: TokenChunk) -> None:
        if self._broken is None:
            self._streams.end(request_id, chunk)
        self._mark_busy()

    def _refused(self, error: ServerError) -> None:
        self._break(str(error))
