"""Engines that hand out a request's tokens in one chunk, when it ends: what they have in common."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from asyncrl.core.records import FinishReason
from asyncrl.rollout.engines.base import EngineError, GenerationRequest, TokenChunk
from asyncrl.rollout.engines.requests import refuse_impossible


class StreamingEngine(ABC):
    """The part of an `Engine` between its callers and what computes: requests that are queued at once, and
    what becomes of them when it breaks.

    capacity: requests that decode at the same time. vocab_size, max_length (of prompt and output, in tokens):
    what no request may exceed; None where there is no limit. stop_token_ids: end every request, besides its
    own.
    """

    def __init__(
        self,
        *,
        capacity: int,
        vocab_size: int | None = None,
        max_length: int | None = None,
        stop_token_ids: tuple[int, ...] = (),
    ) -> None:
        self.capacity = capacity
        self._vocab_size = vocab_size
        self._max_length = max_length
        self._stop_token_ids = stop_token_ids
        self._streams = Streams(self.abort)
        self._broken: Exception | None = None
        self._changed = asyncio.Event()
        """Set with every request, and when the engine breaks."""
        self._busy_s = 0.0
        self._busy_since: float | None = None

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """See `Engine`."""

    @abstractmethod
    def _submit(self, request: GenerationRequest) -> None:
        """Queue a request whose stream is open."""

    @abstractmethod
    def _has_requests(self) -> bool:
        """Running or about to run."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Queues the request at once, not at the first iteration; it runs whether or not somebody iterates.
        Cancelling or closing the iteration aborts it."""
        self._refuse_broken()
        self._streams.refuse_duplicate(request.request_id)
        self._refuse(request)
        stream = self._streams.open(request.request_id)
        self._submit(request)
        self._mark_busy()
        self._changed.set()
        return stream

    def forget(self) -> None:  # noqa: B027 - most have nothing to do
        """See `SteppedEngine`. One that keeps nothing of requests that have ended has nothing to forget."""

    async def close(self) -> None:
        """End `run` and every pending stream with `EngineError`. May be called more than once."""
        self._break("the engine was closed")

    async def _change(self, timeout_s: float | None = None) -> None:
        """Wait for a request, until the engine breaks, or for so long."""
        self._changed.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), timeout_s)

    def _refuse(self, request: GenerationRequest) -> None:
        """Raise `ValueError` for what can never run."""
        refuse_impossible(request, self._vocab_size, self._max_length)

    def _refuse_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _stop_ids(self, request: GenerationRequest) -> list[int]:
        """Ids beyond the vocabulary can never be sampled, and vLLM refuses them."""
        ids = {*self._stop_token_ids, *request.sampling.stop_token_ids}
        return sorted(i for i in ids if self._vocab_size is None or i < self._vocab_size)

    def _break(self, reason: str | Exception) -> Exception:
        """End every stream, and all calls after it, with `EngineError`; the first reason counts."""
        if self._broken is None:
            self._broken = EngineError(reason) if isinstance(reason, str) else reason
            self._streams.fail(str(reason))
            self._mark_busy()
            self._changed.set()
        return self._broken

    def _mark_busy(self) -> None:
        """Keep the clock of the time with requests running or about to run."""
        busy = self._broken is None and self._has_requests()
        if busy and self._busy_since is None:
            self._busy_since = time.perf_counter()
        elif not busy and self._busy_since is not None:
            self._busy_s += time.perf_counter() - self._busy_since
            self._busy_since = None

    def _busy_so_far_s(self) -> float:
        return self._busy_s + (0.0 if self._busy_since is None else time.perf_counter() - self._busy_since)


class Streams:
    """The streams of the requests that have not ended, by request id."""

    def __init__(self, abort: Callable[[str], None]) -> None:
        """`abort` is called with the id of a request whose consumer was cancelled or closed."""
        self._abort = abort
        self._pending: dict[str, asyncio.Future[TokenChunk]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pending

    def __len__(self) -> int:
        return len(self._pending)

    def refuse_duplicate(self, request_id: str) -> None:
        if request_id in self._pending:
            raise ValueError(f"request {request_id!r} is running already; ids are unique")

    def open(self, request_id: str) -> AsyncIterator[TokenChunk]:
        chunk = asyncio.get_running_loop().create_future()
        self._pending[request_id] = chunk
        return _Stream(chunk, lambda: self._abort(request_id))

    def end(self, request_id: str, chunk: TokenChunk) -> None:
        """Deliver the request's one chunk."""
        assert isinstance(chunk.finish_reason, FinishReason)
        future = self._pending.pop(request_id)
        if not future.done():
            future.set_result(chunk)

    def fail(self, reason: str) -> None:
        """End every open stream with `EngineError`."""
        for future in self._pending.values():
            if not future.done():
                future.set_exception(EngineError(reason))
                future.exception()  # marks it as seen: a stream that nobody iterates any more is no news
        self._pending.clear()


class _Stream(AsyncIterator[TokenChunk]):
    def __init__(self, chunk: asyncio.Future[TokenChunk], abort: Callable[[], None]) -> None:
        self._chunk: asyncio.Future[TokenChunk] | None = chunk
        self._abort = abort

    async def __anext__(self) -> TokenChunk:
        if self._chunk is None:
            raise StopAsyncIteration
        try:
            return await self._chunk
        except asyncio.CancelledError:  # and the future is, too: the engine gives it nothing more
            self._abort()
            raise
        finally:
            self._chunk = None

    async def aclose(self) -> None:
        """Abort the request if it has not ended."""
        if self._chunk is not None and not self._chunk.done():
            self._abort()
        self._chunk = None
