"""The policy's weights, gathered from the ranks a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor, nn

from asyncrl.trainer.deepspeed.pieces import gathered, is_scattered
from asyncrl.weights.manifest import Manifest


class GatheredWeights:
    """`ScatteredWeights` of a model under DeepSpeed. All ranks walk through `parts` together."""

    def __init__(self, model: nn.Module) -> None:
        # Parameters that are tied come once, under their first name; buffers are not trained.
        self._parameters = dict(model.named_parameters())
        self.manifest = Manifest.lay_out(
            (name, p.dtype, tuple(p.ds_shape if is_scattered(p) else p.shape))
            for name, p in self._parameters.items()
        )

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        for _, layer in groupby(self._parameters, key=_layer):
            names = list(layer)
            with gathered([self._parameters[name] for name in names]):
                for name in names:
                    yield name, self._parameters[name].detach()
                # DeepSpeed gives the memory to whatever its own streams do next.
                _wait_for_reads(self._parameters[names[0]])


def _wait_for_reads(parameter: nn.Parameter) -> None:
    """Until what this thread has asked the GPU to do with a gathered parameter is done."""
    if is_scattered(parameter) and parameter.is_cuda:
        torch.cuda.current_stream(parameter.device).synchronize()


def _layer(name: str) -> str:
    """`model.layers.7` of `model.layers.7.mlp.up_proj.weight`; the module's own name outside the layers."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1] if numbers else parts[:-1])
