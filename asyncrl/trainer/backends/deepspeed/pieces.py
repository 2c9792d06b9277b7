"""What DeepSpeed has shared out over the ranks, put together and taken apart. All ranks do the same here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from asyncrl.trainer.learner import adamw_start


def is_scattered(tensor: Tensor) -> bool:
    """Whether each rank holds a piece of it (ZeRO 3, of parameters), rather than the whole."""
    return hasattr(tensor, "ds_id")


def gathered(tensors: Sequence[Tensor], *, modified: bool = False) -> AbstractContextManager[object]:
    """Has them whole on each rank meanwhile. `modified`: every rank writes the same into them."""
    scattered = [tensor for tensor in tensors if is_scattered(tensor)]
    if not scattered:
        return nullcontext()
    return deepspeed.zero.GatheredParameters(scattered, modifier_rank=0 if modified else None)


def optimizer_states(optimizer: ZeROOptimizer) -> list[dict[str, Tensor]]:
    """AdamW's state of each of this rank's partitions: of the live ones, also those that DeepSpeed would only
    make, or make known to its parameters, in the course of the first updates."""
    partitions, groups = _partitions(optimizer)
    for number, partition in enumerate(partitions):
        if not optimizer.state[partition]:
            optimizer.state[partition] = adamw_start(partition.detach())
        if groups is not None:
            lazy_init_hp_params_optimizer_state(groups[number], partition, optimizer.state)
    return [optimizer.state[partition] for partition in partitions]


def _partitions(optimizer: ZeROOptimizer) -> tuple[list[Tensor], list[list[nn.Parameter]] | None]:
    """This rank's float32 masters, and the parameters that each is a part of (None where those are
    scattered). DeepSpeed has an optimizer for ZeRO 3, one for 2, and one for 1 in bfloat16."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return optimizer.fp32_partitioned_groups_flat, None
    if hasattr(optimizer, "fp32_groups_flat_partition"):
        return optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
    return optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups


def set_whole(parameter: nn.Parameter, value: Tensor, kind: str | None = None) -> None:
    """Give each rank its piece of a parameter's float32 master, or of its optimizer state of this kind."""
    if not is_scattered(parameter):
        if kind is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)
        return
    piece = _piece(parameter, value)
    if kind is None:
        safe_set_local_fp32_param(parameter, piece)
    else:
        safe_set_local_optimizer_state(parameter, piece, kind)


def _piece(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """This rank's, as ZeRO 3 cuts: pieces of the same length, the end of the last one padded with zeros.
    (DeepSpeed's own function for whole values takes none that need padding.)"""
    group = parameter.ds_process_group
    length = parameter.partition_numel()
    padding = length * dist.get_world_size(group) - value.numel()
    padded = torch.nn.functional.pad(value.flatten(), (0, padding))
    return padded[length * dist.get_rank(group) :][:length]


class ScatteredPieces:
    """An adapter's `Pieces` under ZeRO 3."""

    def __init__(self, optimizer: ZeROOptimizer) -> None:
        self._optimizer = optimizer

    def gathered(self, tensors: Sequence[Tensor]) -> AbstractContextManager[object]:
        return gathered(tensors)

    @contextmanager
    def writing(self) -> Iterator[None]:
        self._optimizer.empty_partition_cache()  # what is whole now would be taken for the newest
        yield
        wait_for_streams(self._optimizer.module.parameters())  # DeepSpeed gathers on a stream of its own

    def of(self, weight: Tensor) -> tuple[Tensor, int]:
        weight.ds_secondary_tensor = None  # the node's copy (hpZeRO)
        start = weight.partition_numel() * dist.get_rank(weight.ds_process_group)
        length = min(weight.partition_numel(), max(0, weight.ds_numel - start))
        return weight.ds_tensor.narrow(0, 0, length), start


def wait_for_streams(tensors: Iterable[Tensor]) -> None:
    """Until what this thread has asked the GPU to do with scattered ones is done."""
    for device in {tensor.device for tensor in tensors if is_scattered(tensor) and tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
