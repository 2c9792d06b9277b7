"""The dtypes that a model's tensors have once its checkpoint is loaded."""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def as_loaded(model: PreTrainedModel) -> None:
    """Give a model that was made from its configuration the dtypes that `from_pretrained` gives it: some
    families keep a few tensors in float32 (a router's, say), which only loading sees to."""
    kept = model._get_dtype_plan(model.dtype)
    if not kept:
        return
    pattern = re.compile("|".join(name.replace("*", ".*") for name in kept))
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if pattern.search(name):
            tensor.data = tensor.data.to(torch.float32)
