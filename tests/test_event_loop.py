"""How a run's event loop is interrupted."""

import asyncio
import threading

import pytest

from asyncrl import event_loop


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
                assert running.wait(10)
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
