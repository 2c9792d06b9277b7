"""A learner of an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from asyncrl.trainer.learner import Learner, Update
from asyncrl.trainer.lora.adapter import Adapter
from asyncrl.trainer.packing.pack import MicroBatch
from asyncrl.trainer.state import SavedPart, Shapes

BASE = "base"
"""The kind of what tells the base model in a checkpoint: one number, under a name that has the model's hash,
so that the adapter of another model is refused as another model's checkpoint is."""


class AdaptedLearner:
    """`Learner` around one whose parameters are an adapter's: after each of its changes, the model's weights
    follow."""

    def __init__(self, inner: Learner, adapter: Adapter) -> None:
        self._inner = inner
        self._adapter = adapter
        self._base = f"base model {adapter.base_name}"

    def __call__(self, micro: MicroBatch, *inputs: Tensor) -> Any:
        return self._inner(micro, *inputs)

    def backward(self, loss: Tensor) -> None:
        self._inner.backward(loss)

    def update(self, lr: float, training_step: int) -> Update:
        update = self._inner.update(lr, training_step)
        if update.applied:
            self._adapter.merge()
        return update

    @property
    def count(self) -> int:
        return self._inner.count

    def shapes(self) -> Shapes:
        return {**self._inner.shapes(), BASE: {self._base: (1,)}}

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        yield from self._inner.tensors()
        yield BASE, self._base, torch.zeros(1)

    def offload(self) -> None:
        self._inner.offload()

    def reload(self) -> None:
        self._inner.reload()

    def load(self, saved: SavedPart) -> None:
        self._inner.load(saved)
        self._adapter.merge()
