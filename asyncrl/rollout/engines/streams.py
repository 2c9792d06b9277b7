"""The streams of an engine that hands out a request's tokens in one chunk, when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from asyncrl.core.records import FinishReason
from asyncrl.rollout.engines.base import EngineError, TokenChunk


class Streams:
    """The streams of the requests that have not ended, by request id."""

    def __init__(self, abort: Callable[[str], None]) -> None:
        """`abort` is called with the id of a request whose consumer was cancelled or closed."""
        self._abort = abort
        self._pending: dict[str, asyncio.Future[TokenChunk]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pending

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
            # Shielded, or cancelling the consumer would cancel the future under the engine.
            chunk = await asyncio.shield(self._chunk)
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._chunk = None
        return chunk

    async def aclose(self) -> None:
        """Abort the request if it has not ended."""
        if self._chunk is not None and not self._chunk.done():
            self._abort()
        self._chunk = None
