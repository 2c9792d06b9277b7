"""The thread that steps a batch, and alone touches it meanwhile."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread

import torch

from asyncrl.rollout.engines.torch.batch import ContinuousBatch, Finished

SWITCH_S = 0.0005
"""Longest wait of the event loop for the interpreter's lock while a step has it. A step lets go of it at
every operation of torch, but takes it back before anybody has woken up; Python's own 5 ms are more than a
step."""

Order = Callable[[], Sequence[Finished]]
"""What somebody asks of a batch; returns the requests that have ended by it."""


class BatchThread:
    """Steps `batch` for as long as it has requests. Orders are carried out between two steps, in the order of
    the calls, and none is lost.

    step: one step of the batch. deliver: called in the event loop with the requests that have ended, once a
    step at most. fail: called there with what a step or an order has raised; it ends the thread.
    """

    def __init__(
        self,
        batch: ContinuousBatch,
        step: Order,
        deliver: Callable[[Sequence[Finished]], None],
        fail: Callable[[Exception], object],
    ) -> None:
        self._batch = batch
        self._step = step
        self._deliver = deliver
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._switch_s = sys.getswitchinterval()

    def start(self) -> None:
        sys.setswitchinterval(SWITCH_S)
        # A step that hangs must not hold up the end of the process.
        Thread(target=self._work, name="engine", daemon=True).start()

    def do(self, order: Order) -> None:
        self._orders.put(order)

    def stop(self) -> None:
        """End the thread after the step that it is in."""
        self._orders.put(None)

    def _work(self) -> None:
        torch.get_num_threads()  # in a forked process, a thread computes alone until it has asked this
        error: Exception | None = None
        try:
            while self._follow_orders():
                self._tell(self._step())
        except Exception as caught:  # noqa: BLE001 - whoever needs the engine is told
            error = caught
        self._call(self._end, error)

    def _follow_orders(self) -> bool:
        """All that there are; waits for one where there is nothing to step. False: the thread is to end."""
        while True:
            try:
                order = self._orders.get(block=self._batch.idle)
            except Empty:
                return True
            if order is None:
                return False
            self._tell(order())

    def _tell(self, ends: Sequence[Finished]) -> None:
        if ends:
            self._call(self._deliver, ends)

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _end(self, error: Exception | None) -> None:
        sys.setswitchinterval(self._switch_s)
        if error is not None:
            self._fail(error)
        else:  # what has come since is the caller's own to carry out
            while not self._orders.empty():
                if (order := self._orders.get()) is not None:
                    self._deliver(order())
        self.ended.set_result(None)
