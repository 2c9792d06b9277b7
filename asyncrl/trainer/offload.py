"""A trainer's memory on its device, given up between two steps and taken back."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from asyncrl.config import TrainerConfig
from asyncrl.trainer.host_memory import HostMemory
from asyncrl.trainer.learner import TorchLearner
from asyncrl.trainer.ranks import Ranks
from asyncrl.trainer.state import Stateful


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


class Parking:
    """Host memory for tensors that a device has no room for, page-locked for a GPU and the same at every
    stay. Whoever refers to a tensor finds its values wherever they are."""

    def __init__(self) -> None:
        self._memory = HostMemory()
        self._parked: list[tuple[Tensor, torch.device]] = []

    def put(self, tensors: Iterable[Tensor]) -> None:
        alike = Counter[tuple[torch.Size, torch.dtype]]()
        for tensor in {id(tensor): tensor for tensor in tensors}.values():
            kind = tensor.shape, tensor.dtype
            self._parked.append((tensor, tensor.device))
            tensor.data = self._memory.copy((kind, alike[kind]), tensor)
            alike[kind] += 1
        self._memory.settle()

    def bring_back(self) -> None:
        """Each to the device that it was on."""
        for tensor, device in self._parked:
            tensor.data = tensor.data.to(device, non_blocking=True, copy=True)
        self._parked.clear()
        self._memory.settle()


class MovableLearner(TorchLearner):
    """`Movable`."""

    def __init__(self, model: nn.Module, config: TrainerConfig, ranks: Ranks | None = None) -> None:
        super().__init__(model, config, ranks)
        self._parking = Parking()

    def offload(self) -> None:
        self._parking.put(self._resident())

    def reload(self) -> None:
        self._parking.bring_back()

    def _resident(self) -> Iterator[Tensor]:
        """All that lies on the device between two steps."""
        yield from self._model.parameters()
        yield from self._model.buffers()
        yield from self._masters.values()
        for state in self._adamw.state.values():
            yield from state.values()
