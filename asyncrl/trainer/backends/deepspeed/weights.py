"""The policy's weights, gathered from the ranks a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncrl.trainer.backends.deepspeed.pieces import gathered, is_scattered, wait_for_streams
from asyncrl.trainer.models.policy import published
from asyncrl.weights.manifest import Manifest

if TYPE_CHECKING:
    from asyncrl.trainer.lora.adapter import Adapter


class GatheredWeights:
    """`PublishedWeights` of a model under DeepSpeed. All ranks walk through `parts` together.

    dtypes: those that the model was loaded with. DeepSpeed computes with all of it in one, also where a
    family keeps a few tensors, such as a router's, in float32: they are published in their own.
    """

    def __init__(self, model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
        self._tensors = published(model)
        self._dtypes = dtypes
        self.manifest = Manifest.lay_out(
            (name, dtypes[name], tuple(t.ds_shape if is_scattered(t) else t.shape))
            for name, t in self._tensors.items()
        )

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        for _, layer in groupby(self._tensors, key=_layer):
            tensors = {name: self._tensors[name] for name in layer}
            with gathered([*tensors.values()]):
                for name, tensor in tensors.items():
                    yield name, tensor.detach().to(self._dtypes[name])
                # DeepSpeed gives the memory to whatever its own streams do next.
                wait_for_streams(tensors.values())


class GatheredAdapter:
    """`PublishedWeights` of an adapter under ZeRO 3. Made before that takes the model apart; all ranks walk
    through `parts` together."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self.manifest = adapter.weights().manifest

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        with gathered(self._adapter.parameters):
            yield from self._adapter.weights().parts()
            wait_for_streams(self._adapter.parameters)


def _layer(name: str) -> str:
    """`model.layers.7` of `model.layers.7.mlp.up_proj.weight`; the module's own name outside the layers."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])
