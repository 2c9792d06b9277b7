"""A weight version as a saved checkpoint has it, for engines that load checkpoints.

The trainer publishes a model's tensors as transformers holds them: those of all experts of a layer in one,
and some under names of its own. A checkpoint has others, which the hub's files have and vLLM knows;
transformers makes them when it saves. Each of them is a part of one that is published, seen in another way,
so that nothing is copied here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from asyncrl.weights.source import WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor of a checkpoint, and where its values lie in a published one, laid out contiguously."""

    name: str
    source: str
    """Name of the published tensor."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """Of its first value, counted in values."""


def checkpoint_tensors(model: PreTrainedModel, state: Mapping[str, Tensor]) -> tuple[CheckpointTensor, ...]:
    """What `save_pretrained` would write of `state`, tensors of `model` (both on the meta device) by their
    `state_dict` names. Raises `WeightsError` where it would compute something else than views of them."""
    from transformers.core_model_loading import revert_weight_conversion

    sources = {_storage(tensor): name for name, tensor in state.items()}
    try:
        with _NoCopies():
            saved = revert_weight_conversion(model, dict(state))
        return tuple(
            CheckpointTensor(
                name, sources[_storage(t)], tuple(t.shape), tuple(t.stride()), int(t.storage_offset())
            )
            for name, t in saved.items()
        )
    except (KeyError, RuntimeError) as error:
        raise WeightsError(
            f"a checkpoint of {type(model).__name__} has weights that transformers computes from those of "
            "the model, and only the default engine can take the model's own; leave rollout.engine out"
        ) from error


def as_checkpoint(tensors: Mapping[str, Tensor], saved: Sequence[CheckpointTensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors, sharing the memory of the published `tensors`, by `state_dict` name."""
    return {s.name: _view(tensors[s.source].contiguous(), s) for s in saved}


def _view(source: Tensor, saved: CheckpointTensor) -> Tensor:
    return source.as_strided(saved.shape, saved.stride, source.storage_offset() + saved.offset)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _NoCopies(TorchDispatchMode):
    """What would be made contiguous stays the view that it is."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.clone.default:
            return torch.ops.aten.alias.default(args[0])
        return func(*args, **(kwargs or {}))
