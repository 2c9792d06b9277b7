"""The embedded engine: continuous batching in this process, behind the `Engine` protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from asyncrl.rollout.engines.base import EngineError, EngineStats, GenerationRequest, UpdateReport
from asyncrl.rollout.engines.streams import StreamingEngine
from asyncrl.rollout.engines.torch.batch import ContinuousBatch, Finished
from asyncrl.rollout.engines.torch.thread import STEP, BatchThread, Order
from asyncrl.waits import waiting
from asyncrl.weights.source import WeightSource

T = TypeVar("T")

LAST_STEP_S = 10.0
"""Longest wait for a step to end when the engine is to."""


class TorchEngine(StreamingEngine):
    """`Engine` over a transformers model in this process, on its CPU or GPU.

    `run` steps in a thread of its own, so that nobody in the event loop waits for a step, nor a step for
    them; requests, aborts and new weights take effect between two steps. A caller that wants a deterministic
    schedule calls `step` itself instead, and all of it happens at once, in the caller's thread. A request's
    output comes as one chunk when it ends. The order of admission is the order of the calls of `generate`,
    later turns of episodes first.

    model: becomes the engine's own (evaluation mode, attention, weights). Its weights are version 0. Raises
        `UnsupportedModelError` for a model that cannot run exactly.
    capacity: requests that decode at the same time. Their key-value cache is allocated up front.
    spare: sequences whose keys and values are kept for requests that go on from them, beside those that
        decode; allocated up front as well.
    max_length: longest prompt plus output, in tokens.
    kv_on_update: on a weight update, `keep` keys and values, for the running requests and for later turns of
        their episodes, or `recompute` the running ones'. Others reuse nothing of older weights.
    stop_token_ids: end every request, besides its own.
    prefill_tokens: prompt tokens (padding included) that are computed between two decode steps, unless one
        prompt alone is longer.
    cuda_graphs: capture decode steps as CUDA graphs. A weight update then copies the new weights into the
        place of the old, instead of changing pointers.
    """

    batch = ContinuousBatch

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        capacity: int,
        spare: int = 0,
        max_length: int,
        kv_on_update: Literal["keep", "recompute"] = "keep",
        stop_token_ids: tuple[int, ...] = (),
        prefill_tokens: int = 4096,
        cuda_graphs: bool = False,
    ) -> None:
        if capacity < 1 or max_length < 2:
            raise ValueError(
                f"capacity={capacity}, max_length={max_length}; needed: capacity >= 1, max_length >= 2"
            )
        self._batch = self.batch(
            model,
            capacity=capacity,
            spare=spare,
            max_length=max_length,
            kv_on_update=kv_on_update,
            stop_token_ids=stop_token_ids,
            prefill_tokens=prefill_tokens,
            cuda_graphs=cuda_graphs,
        )
        super().__init__(capacity=capacity, vocab_size=self._batch.vocab_size, max_length=max_length)
        self._updating = asyncio.Lock()
        self._thread: BatchThread | None = None
        """Of the last `run`. Until it has ended it has the batch to itself."""
        self._counts = 0, 0, 0
        """Version, running requests and generated tokens after the last step or order."""

    async def run(self) -> None:
        self._refuse_to_step()
        self._thread = BatchThread(self._batch, self._carry_out, self._deliver, self._break)
        self._thread.start()
        try:
            await asyncio.wait([self._thread.ended])
        finally:
            await self._end_thread()
        self._refuse_broken()

    def step(self) -> None:
        self._refuse_to_step()
        self._do(STEP, self._batch.step)

    def abort(self, request_id: str) -> None:
        if self._broken is None:
            self._do("abort", lambda: [end] if (end := self._batch.abort(request_id)) else [])

    async def update_weights(self, source: WeightSource) -> UpdateReport:
        """Updates that overlap are applied one after the other. While one is staged the engine holds two sets
        of weights."""
        async with self._updating:
            started = time.perf_counter()
            staged = await asyncio.to_thread(lambda: self._batch.weights.stage(source.tensors()))
            stage_s = time.perf_counter() - started
            self._refuse_broken()
            pause_s = await self._done(self._swap(staged, source.version))
            return UpdateReport(source.version, stage_s, pause_s)

    async def _done(self, order: Future[T]) -> T:
        """What an order gives, by whoever has the batch. Raises `EngineError` where it breaks the engine."""
        if (thread := self._driver) is not None:
            either: list[asyncio.Future[Any]] = [asyncio.wrap_future(order), thread.ended]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        self._refuse_broken()
        return order.result()

    def swap(self, tensors: Mapping[str, Tensor], version: int) -> float:
        self._refuse_to_step()
        return self._swap(self._batch.weights.stage(tensors), version).result()

    def forget(self) -> None:
        self._do("forgetting", self._batch.forget)

    async def close(self) -> None:
        await super().close()
        await self._end_thread()

    def stats(self) -> EngineStats:
        version, running, generated_tokens = self._counts
        waiting = max(0, len(self._streams) - running)
        return EngineStats(version, running, waiting, generated_tokens, self._busy_so_far_s())

    def _submit(self, request: GenerationRequest) -> None:
        self._do("submission", partial(self._batch.submit, request))

    def _has_requests(self) -> bool:
        return len(self._streams) > 0

    def _swap(self, staged: Mapping[str, Tensor], version: int) -> Future[float]:
        """Gives the seconds that it takes; never done where it breaks the engine."""
        swapped: Future[float] = Future()
        what = f"update to version {version}"
        self._do(what, lambda: swapped.set_result(self._batch.swap(staged, version)))
        return swapped

    @property
    def _driver(self) -> BatchThread | None:
        """The thread that has the batch to itself; None where the caller has it."""
        return None if self._thread is None or self._thread.ended.done() else self._thread

    def _refuse_to_step(self) -> None:
        self._refuse_broken()
        if self._driver is not None:
            raise RuntimeError("`run` drives this engine; its steps are not the caller's to take")

    def _do(self, what: str, order: Order) -> None:
        """By the thread between two steps; without one, at once."""
        if (thread := self._driver) is not None:
            thread.do(what, order)
            return
        try:
            self._deliver(self._carry_out(what, order))
        except EngineError as error:
            raise self._break(error) from error.__cause__

    def _carry_out(self, what: str, order: Order) -> Sequence[Finished]:
        """In the thread that has the batch. Returns the requests that have ended by it."""
        try:
            ends = order()
        except Exception as error:
            raise EngineError(f"{what} failed half-way: {type(error).__name__}: {error}") from error
        self._counts = self._batch.version, self._batch.running, self._batch.generated_tokens
        return ends or ()

    def _deliver(self, ends: Sequence[Finished]) -> None:
        for request, chunk in ends:
            if request.request_id in self._streams:  # else the engine broke in the meantime
                self._streams.end(request.request_id, chunk)
        self._mark_busy()

    async def _end_thread(self) -> None:
        if (thread := self._driver) is None:
            return
        thread.stop()
        with waiting("the engine's last step"):
            done, _ = await asyncio.wait([thread.ended], timeout=LAST_STEP_S)
        if not done:
            self._break(f"its last step has taken longer than {LAST_STEP_S:g} s")
            thread.ended.set_result(None)  # whoever waits for it has waited long enough
