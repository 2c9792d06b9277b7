"""A trainer's memory on its device, given up between two steps and taken back."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor

from asyncrl.trainer.learner import TorchLearner
from asyncrl.trainer.state import Stateful

HOST = torch.device("cpu")


class Movable(Stateful, Protocol):
    """As every part of a trainer is that is to give up its memory."""

    def offload(self) -> None:
        """Between two steps: have nothing of any size in the memory of the trainer's device. Until `reload`,
        nothing else is called."""

    def reload(self) -> None: ...


def offload(parts: Mapping[str, Stateful]) -> None:
    """All of a trainer's."""
    for part in parts.values():
        cast(Movable, part).offload()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reload(parts: Mapping[str, Stateful]) -> None:
    """All of them, in the order in which they were made: later ones may go by earlier ones."""
    for part in parts.values():
        cast(Movable, part).reload()


def move(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Whoever refers to them finds their values there from now on."""
    for tensor in tensors:
        tensor.data = tensor.data.to(device)


class MovableLearner(TorchLearner):
    """`Movable`."""

    def offload(self) -> None:
        self._device = next(self._model.parameters()).device
        move(self._resident(), HOST)

    def reload(self) -> None:
        move(self._resident(), self._device)

    def _resident(self) -> Iterator[Tensor]:
        """All that lies on the device between two steps."""
        yield from self._model.parameters()
        yield from self._model.buffers()
        yield from self._masters.values()
        for state in self._adamw.state.values():
            yield from state.values()
