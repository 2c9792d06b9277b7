"""What a model keeps of a sequence while it decodes, measured without weights or memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncrl.decoders.forward import cache_name


@torch.inference_mode()
def kept_values(shell: PreTrainedModel) -> tuple[int, int]:
    """How many numbers the model's own cache holds for each token (short of its windows' ends), and how many
    for a sequence whatever its length: recurrent states. shell: the model on the meta device, which this
    alters. Raises whatever the model's code does where it does not run there."""
    shell.eval()
    shell.set_experts_implementation("batched_mm")  # the others look at values
    name = cache_name(shell)
    assert name is not None, "it takes no cache"
    held = []
    for length in (1, 2):
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        cache = shell(input_ids=ids, use_cache=True)[name]
        held.append(sum(tensor.numel() for layer in cache.layers for tensor in floats(vars(layer))))
    per_token = held[1] - held[0]
    return per_token, held[0] - per_token


def floats(value: Any) -> Iterable[Tensor]:
    """All tensors of floating-point numbers within nested containers."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from floats(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from floats(part)
