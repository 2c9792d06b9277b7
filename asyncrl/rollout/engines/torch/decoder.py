"""What batching asks of a Hugging Face decoder: fill rows with known tokens, decode one token per row."""

from __future__ import annotations

import inspect
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel


class UnsupportedModelError(ValueError):
    """The embedded engine cannot run this model, or could not run it exactly."""


class Decoder(Protocol):
    """Rows 0 .. A decode; `fill` writes any rows. Arrays of the host go in, logits on the device come out."""

    model: PreTrainedModel
    device: torch.device
    vocab_size: int
    slots: int
    max_length: int
    """Of a row, in tokens."""
    keeps_prefixes: bool
    """Whether a filled row can be continued, or copied, from every shorter prefix; else from its end only."""

    def fill(self, rows: NDArray[np.int64], tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Compute and keep what the first `lengths` [N] of `tokens` [N, T] leave behind, as the beginning of
        `rows` [N]. What pads `tokens` on the right may be any valid id."""

    def decode(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """Logits [A, V] after `tokens` [A], each at its own of `positions` [A], in rows 0 .. A. A row goes on
        from where it stands, or again from where it was filled to, or from nothing."""

    def copy(self, sources: list[int], targets: list[int], width: int) -> None:
        """Copy what the first `width` tokens of rows `sources` have left to rows `targets`, as if all at
        once."""


def vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def accepted(model: PreTrainedModel) -> frozenset[str]:
    """The names of what the model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def last_only(model: PreTrainedModel) -> dict[str, int]:
    """What makes a forward compute the logits of the last position only, where the model can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in accepted(model) else {}


def outgrown_window(model: PreTrainedModel, max_length: int) -> int:
    """The longest attention window or chunk that a request of `max_length` tokens can outgrow, or 0."""
    config = model.config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return max((size for size in sizes if isinstance(size, int) and size < max_length), default=0)
