"""The embedded engine: continuous batching in the event loop, behind the `Engine` protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncrl.rollout.engines.base import (
    EngineStats,
    GenerationRequest,
    UpdateReport,
)
from asyncrl.rollout.engines.streams import StreamingEngine
from asyncrl.rollout.engines.torch.batch import ContinuousBatch, Finished
from asyncrl.weights.source import WeightSource


class TorchEngine(StreamingEngine):
    """`Engine` over a transformers model in this process, on its CPU or GPU.

    Everything but the staging of new weights happens in the event loop's thread, so a swap always falls
    between two decode steps. `run` repeats `step`; a caller that wants a deterministic schedule calls `step`
    itself instead. A request's output comes as one chunk when it ends. The order of admission is the order of
    the calls of `generate`.

    model: becomes the engine's own (evaluation mode, attention, weights). Its weights serve as `version`
        until the first update. Raises `UnsupportedModelError` for a model that cannot run exactly.
    capacity: requests that decode at the same time. Their key-value cache is allocated up front.
    max_length: longest prompt plus output, in tokens.
    kv_on_update: on a weight update, `keep` the running requests' keys and values or `recompute` them.
        Prompts are never shared across versions in either case.
    stop_token_ids: end every request, besides its own.
    prefill_tokens: prompt tokens (padding included) that are computed between two decode steps, unless one
        prompt alone is longer.
    cuda_graphs: capture decode steps as CUDA graphs. A weight update then copies the new weights into the
        place of the old, instead of changing pointers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        capacity: int,
        max_length: int,
        kv_on_update: Literal["keep", "recompute"] = "keep",
        stop_token_ids: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        version: int = 0,
        prefill_tokens: int = 4096,
        cuda_graphs: bool = False,
    ) -> None:
        if capacity < 1 or max_length < 2:
            raise ValueError(
                f"capacity={capacity}, max_length={max_length}; needed: capacity >= 1, max_length >= 2"
            )
        self._batch = ContinuousBatch(
            model if device is None else model.to(device),
            capacity=capacity,
            max_length=max_length,
            kv_on_update=kv_on_update,
            stop_token_ids=stop_token_ids,
            version=version,
            prefill_tokens=prefill_tokens,
            cuda_graphs=cuda_graphs,
        )
        super().__init__(capacity=capacity, vocab_size=self._batch.vocab_size, max_length=max_length)
        self._updating = asyncio.Lock()

    async def run(self) -> None:
        while self._broken is None:
            if self._batch.idle:
                await self._change()
            else:
                self.step()
                await asyncio.sleep(0)
        raise self._broken

    def step(self) -> None:
        """Refill the free slots and decode one token of every running request; nothing when there is none.
        Raises `EngineError`, as do all calls after it, when the step fails."""
        self._refuse_broken()
        self._mark_busy()
        try:
            finished = self._batch.step()
        except Exception as error:
            raise self._break(f"decode step failed: {type(error).__name__}: {error}") from error
        for end in finished:
            self._deliver(end)
        self._mark_busy()

    def abort(self, request_id: str) -> None:
        if request_id in self._streams:
            end = self._batch.abort(request_id)
            assert end is not None, f"request {request_id!r} is pending and in no queue"
            self._deliver(end)
            self._mark_busy()

    async def update_weights(self, source: WeightSource) -> UpdateReport:
        """Updates that overlap are applied one after the other. While one is staged the engine holds two sets
        of weights."""
        async with self._updating:
            started = time.perf_counter()
            staged = await asyncio.to_thread(lambda: self._batch.weights.stage(source.tensors()))
            stage_s = time.perf_counter() - started
            return UpdateReport(source.version, stage_s, self._swap(staged, source.version))

    def swap(self, tensors: Mapping[str, Tensor], version: int) -> float:
        """Update at once, between two calls of `step`. The engine adopts `tensors` as its own: hand it
        copies. Returns the seconds it took. Raises `WeightsError`, and keeps the old weights, when they do
        not fit the model."""
        return self._swap(self._batch.weights.stage(tensors), version)

    def stats(self) -> EngineStats:
        batch = self._batch
        return EngineStats(
            batch.version, batch.running, batch.waiting, batch.generated_tokens, self._busy_so_far_s()
        )

    def _submit(self, request: GenerationRequest) -> None:
        self._batch.submit(request)

    def _has_requests(self) -> bool:
        return not self._batch.idle

    def _swap(self, staged: Mapping[str, Tensor], version: int) -> float:
        self._refuse_broken()
        try:
            return self._batch.swap(staged, version)
        except Exception as error:
            raise self._break(
                f"update to version {version} failed half-way: {type(error).__name__}: {error}"
            ) from error

    def _deliver(self, end: Finished) -> None:
        request, chunk = end
        self._streams.end(request.request_id, chunk)
