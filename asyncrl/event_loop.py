"""Runs a coroutine in an event loop, from any context, and ends it, or one of its tasks, cleanly."""

from __future__ import annotations

import asyncio
import selectors
import signal
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from asyncrl.states import doing

T = TypeVar("T")
START_TIMEOUT_S = 5.0
"""Longest wait for a loop to start in its own thread."""


def run_to_end(main: Coroutine[Any, Any, T]) -> T:
    """Run an event loop until `main` ends and return its result. Where this thread already has a loop (in a
    notebook), another thread runs it.

    Ctrl-C, SIGTERM and a terminal that closes cancel `main`, wait until it has cleaned up, and raise
    `KeyboardInterrupt`."""
    if _loop_is_running():
        return _run_in_thread(main)
    try:
        return asyncio.run(_terminable(main))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def idle_is_waiting() -> asyncio.AbstractEventLoop:
    """An event loop of a process that is in `wait_work` (`asyncrl.states`) while there is nothing to run."""
    return asyncio.SelectorEventLoop(_IdleSelector())


class _IdleSelector(selectors.DefaultSelector):
    @doing("wait_work")
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        return super().select(timeout)


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel a task, and return when it has ended. Raises what it raised, and `CancelledError` only where the
    caller is cancelled: if that awaited the task itself, the end of the one could not be told from the other.
    """
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


def _run_in_thread(main: Coroutine[Any, Any, T]) -> T:
    """An exception in the caller first cancels `main` and waits for its clean-up."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[T]]] = Future()

    async def tell() -> T:
        task = asyncio.current_task()
        assert task is not None
        started.set_result((asyncio.get_running_loop(), task))
        return await main

    with ThreadPoolExecutor(1, thread_name_prefix="asyncrl") as executor:
        done = executor.submit(asyncio.run, tell())
        try:
            return done.result()
        except BaseException:
            if not done.done():
                loop, task = started.result(timeout=START_TIMEOUT_S)
                loop.call_soon_threadsafe(task.cancel)
            raise


def _loop_is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _terminable(main: Coroutine[Any, Any, T]) -> T:
    """Other signals cancel `main` as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        return await main
    task = asyncio.ensure_future(main)
    loop = asyncio.get_running_loop()
    heard = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is by `nohup`
        heard.append(signal.SIGHUP)
    for end in heard:
        loop.add_signal_handler(end, task.cancel)
    try:
        return await task
    finally:
        for end in heard:
            loop.remove_signal_handler(end)
