"""The embedded engine where it takes turns with the trainer (`placement.colocate: turns`)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future

import torch
from torch import Tensor

from asyncrl.rollout.engines.torch.batch import ContinuousBatch, Finished
from asyncrl.rollout.engines.torch.engine import TorchEngine
from asyncrl.states import doing


class SleepingBatch(ContinuousBatch):
    """One that can give up its memory between two steps."""

    _asleep = False

    @property
    def idle(self) -> bool:
        return self._asleep or super().idle

    def step(self) -> list[Finished]:
        return [] if self._asleep else super().step()

    def sleep(self) -> None:
        """Give up the memory of weights, keys and values. Nothing is decoded before the next `swap`, of
        whichever version, which computes those of what runs anew; what is submitted waits for it."""
        if not self._recompute:
            raise ValueError("kv_on_update=keep: sleeping gives up keys and values; use recompute")
        self.forget()
        self.weights.leave()
        self._decoder.leave()
        self._asleep = True
        if self._decoder.device.type == "cuda":
            torch.cuda.empty_cache()

    @doing("swap")
    def swap(self, staged: Mapping[str, Tensor], version: int) -> float:
        started = time.perf_counter()
        if self._asleep:
            self._decoder.come_back()
            self._asleep = False
        super().swap(staged, version)
        return time.perf_counter() - started


class SleepingEngine(TorchEngine):
    batch = SleepingBatch
    _batch: SleepingBatch

    async def sleep(self) -> None:
        async with self._updating:
            asleep: Future[None] = Future()
            self._do("giving up its memory", lambda: asleep.set_result(self._batch.sleep()))
            await self._done(asleep)

    def give_up_memory(self) -> None:
        self._refuse_to_step()
        self._do("giving up its memory", self._batch.sleep)
