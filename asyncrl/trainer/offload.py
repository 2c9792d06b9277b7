"""A trainer's memory on its device, given up between two steps and taken back."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from asyncrl.trainer.state import Stateful

HOST = torch.device("cpu")


def offload(parts: Mapping[str, Stateful]) -> None:
    """All of a trainer's."""
    for part in parts.values():
        part.offload()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def reload(parts: Mapping[str, Stateful]) -> None:
    """All of them, in the order in which they were made: later ones may go by earlier ones."""
    for part in parts.values():
        part.reload()


def move(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Whoever refers to them finds their values there from now on."""
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
