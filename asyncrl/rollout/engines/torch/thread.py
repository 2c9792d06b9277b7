"""The thread that steps a batch, and alone touches it meanwhile."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread

from asyncrl.affinity import use_torch_threads
from asyncrl.rollout.engines.torch.batch import ContinuousBatch, Finished
from asyncrl.work import stepping

SWITCH_S = 0.0005
"""Longest wait of the event loop for the interpreter's lock while a step has it. A step lets go of it at
every operation of torch, but takes it back before anybody has woken up; Python's own 5 ms are more than a
step."""
_before_s: list[float] = []
"""What it was before each thread that runs: the last one that ends restores Python's own."""

STEP = "decode step"

Order = Callable[[], Sequence[Finished] | None]
"""What somebody asks of a batch. Gives the requests that have ended by it."""


class BatchThread:
    """Steps `batch` for as long as it has requests. Orders are carried out between two steps, in the order of
    the calls, and none is lost.

    carry_out: called in the thread with each order, the steps among them, and what it is. deliver: called in
    the event loop with the requests that have ended. fail: called there with what `carry_out` has raised; it
    ends the thread.
    """

    def __init__(
        self,
        batch: ContinuousBatch,
        carry_out: Callable[[str, Order], Sequence[Finished]],
        deliver: Callable[[Sequence[Finished]], None],
        fail: Callable[[Exception], object],
    ) -> None:
        self._batch = batch
        self._carry_out = carry_out
        self._deliver = deliver
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._orders: SimpleQueue[tuple[str, Order] | None] = SimpleQueue()
        self.ended: asyncio.Future[None] = self._loop.create_future()

    def start(self) -> None:
        _before_s.append(sys.getswitchinterval())
        sys.setswitchinterval(SWITCH_S)
        # A step that hangs must not hold up the end of the process.
        Thread(target=self._work, name="engine", daemon=True).start()

    def do(self, what: str, order: Order) -> None:
        self._orders.put((what, order))

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._orders.put(None)

    def _work(self) -> None:
        use_torch_threads()
        error: Exception | None = None
        try:
            while (order := self._next()) is not None:
                with stepping():
                    ends = self._carry_out(*order)
                del order  # or the weights of a swap would be kept for as long as there is nothing to do
                if ends:
                    self._call(self._deliver, ends)
        except Exception as caught:  # noqa: BLE001 - whoever needs the engine is told
            error = caught
        self._call(self._end, error)

    def _next(self) -> tuple[str, Order] | None:
        """An order, as long as there are any or nothing to step; else a step. None: the thread is to end."""
        try:
            return self._orders.get(block=self._batch.idle)
        except Empty:
            return STEP, self._batch.step

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _end(self, error: Exception | None) -> None:
        sys.setswitchinterval(_before_s.pop())
        try:
            while error is None and not self._orders.empty():  # what has come since
                if (order := self._orders.get()) is not None:
                    self._deliver(self._carry_out(*order))
        except Exception as caught:  # noqa: BLE001 - as above
            error = caught
        if error is not None:
            self._fail(error)
        if not self.ended.done():  # else nobody waits for it any more
            self.ended.set_result(None)
