"""An event loop in a thread of its own, beside whatever the process computes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")
_CLOSE_S = 5.0
"""Longest wait for anything that is to end; what does not ends with the process."""


class LoopThread:
    """Runs coroutines for the other threads of the process, until it is closed."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        # One at a time is all that is computed for it.
        self._loop.set_default_executor(ThreadPoolExecutor(1, thread_name_prefix=name))
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for its end, which is its own to bring about in time."""
        return self.start(coroutine).result()

    def end_with(self, last: Coroutine[Any, Any, None]) -> None:
        """Run what closes things, and close."""
        if not self.is_running:
            last.close()
            return
        try:
            with suppress(TimeoutError):
                self.start(last).result(_CLOSE_S)
        finally:
            self.close()

    @property
    def is_running(self) -> bool:
        """Whether it has not been closed."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Cancel what is left, and end the thread."""
        if self.is_running:
            with suppress(TimeoutError):
                self.start(_cancel_others()).result(_CLOSE_S)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_S)
        if not self.is_running:
            self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
