"""The trainer's processes, as the training step sees them: who am I, and sums over all."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Ranks(Protocol):
    """All ranks do the same calls in the same order. Each holds the whole batch and computes its share.

    A sum says where its tensor lies, for the two ways lead through different process groups: NCCL knows
    nothing of host memory. Both raise `DeviceError` for a tensor that lies elsewhere.
    """

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, on each of them, in place. The tensor lies on the device that the
        ranks compute on."""

    def sum_on_host(self, tensor: Tensor) -> Tensor:
        """The same of a tensor in host memory."""


class DeviceError(AssertionError):
    """A collective was given a tensor that its process group cannot reach: always a defect of AsyncRL."""


def check_device(tensor: Tensor, device: torch.device) -> None:
    """Raises `DeviceError` unless the tensor lies on a device of this kind."""
    if tensor.device.type != device.type:
        raise DeviceError(
            f"a tensor of shape {list(tensor.shape)} on {tensor.device} was to be summed over ranks that "
            f"share only what lies on {device.type}: move it there first, or take the other sum"
        )


class OneRank:
    """Nothing to sum; `device` is where it computes."""

    rank = 0
    size = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def sum(self, tensor: Tensor) -> Tensor:
        check_device(tensor, self._device)
        return tensor

    def sum_on_host(self, tensor: Tensor) -> Tensor:
        check_device(tensor, torch.device("cpu"))
        return tensor


def gathered_on_host(ranks: Ranks, tensor: Tensor) -> Tensor:
    """[size, ...]: the tensors of all ranks, which lie in host memory, on each of them."""
    slots = torch.zeros(ranks.size, *tensor.shape, dtype=tensor.dtype)
    slots[ranks.rank] = tensor
    return ranks.sum_on_host(slots)
