"""How a run's event loop is interrupted."""

import asyncio
import gc
import os
import signal
import threading
from contextlib import nullcontext

import pytest

from asyncrl import event_loop

LONG_S = 120.0


def test_an_interrupt_reaches_a_run_beside_a_running_loop(monkeypatch):
    """As in a notebook: the loop of the caller goes on, the run has one in a thread."""
    running, cleaned_up = threading.Event(), threading.Event()

    async def main():
        try:
            running.set()
            await asyncio.sleep(3600)
        finally:
            cleaned_up.set()

    class Interrupted(event_loop.ThreadPoolExecutor):
        def submit(self, *args):
            future = super().submit(*args)
            wait = future.result

            def result(timeout=None):
                assert running.wait(LONG_S)
                monkeypatch.setattr(future, "result", wait)
                raise KeyboardInterrupt

            monkeypatch.setattr(future, "result", result)
            return future

    monkeypatch.setattr(event_loop, "ThreadPoolExecutor", Interrupted)

    async def notebook():
        with pytest.raises(KeyboardInterrupt):
            event_loop.run_to_end(main())

    asyncio.run(notebook())
    assert cleaned_up.is_set()


@pytest.mark.parametrize(
    ("number", "before", "is_heard"),
    [
        (signal.SIGTERM, signal.SIG_IGN, True),
        (signal.SIGHUP, lambda *_: None, True),
        (signal.SIGHUP, signal.SIG_IGN, False),  # as by `nohup`
    ],
)
def test_a_run_cleans_up_when_it_is_told_to_end_or_its_terminal_closes(number, before, is_heard):
    done = []

    async def main():
        os.kill(os.getpid(), number)
        try:
            await asyncio.sleep(0.2)
            done.append("all")
        finally:
            done.append("cleaned up")

    ours = signal.signal(number, before)
    try:
        with pytest.raises(KeyboardInterrupt) if is_heard else nullcontext():
            event_loop.run_to_end(main())
    finally:
        signal.signal(number, ours)
    assert done == ["all"] * (not is_heard) + ["cleaned up"]


def test_whoever_interrupts_twice_is_told_no_more_than_once(caplog):
    done = []

    async def main():
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(LONG_S)
        finally:
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
            try:
                await asyncio.sleep(LONG_S)
            finally:
                done.append("cleaned up")

    gc.collect()  # what earlier tests have left is complained of now
    caplog.clear()
    with pytest.raises(KeyboardInterrupt):
        event_loop.run_to_end(main())
    gc.collect()
    assert done == ["cleaned up"]
    assert caplog.text == ""


def test_who_waits_for_the_end_of_a_task_can_be_cancelled_meanwhile():
    """Its own cancellation is not taken for that of the task."""

    async def main():
        may_end = asyncio.Event()

        async def slow_to_end():
            try:
                await asyncio.sleep(3600)
            finally:
                await may_end.wait()

        task = asyncio.create_task(slow_to_end())
        await asyncio.sleep(0)
        waiting = asyncio.create_task(event_loop.cancelled(task))
        await asyncio.sleep(0)
        waiting.cancel()
        may_end.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await event_loop.cancelled(task)

    asyncio.run(main())


def test_the_end_of_a_task_tells_what_it_raised():
    async def broken():
        raise ValueError("broken")

    async def main():
        task = asyncio.create_task(broken())
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="broken"):
            await event_loop.cancelled(task)

    asyncio.run(main())
