"""What batching asks of a Hugging Face decoder: fill rows with known tokens, decode one token per row."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from asyncrl.decoders.forward import accepted


class UnsupportedModelError(ValueError):
    """The embedded engine cannot run this model, or could not run it exactly."""


class Decoder(ABC):
    """Rows 0 .. A decode; `fill` writes any rows. Arrays of the host go in, logits on the device come out.

    max_length: of a row, in tokens.
    """

    keeps_prefixes: bool
    """Whether a row can go on, or be copied, from each of its tokens; else from where it was filled to."""

    def __init__(self, model: PreTrainedModel, slots: int, max_length: int) -> None:
        self.model = model
        self.device = model.device
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        self.slots = slots
        self.max_length = max_length
        # So that a forward computes the logits of the last position only, where the model can.
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted(model) else {}

    @abstractmethod
    def fill(self, rows: NDArray[np.int64], tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Compute and keep what `tokens` [N, T] leave behind in `rows` [N]: the last T of the first `lengths`
        [N] of a row, which holds those before them, or all of them, padded on the right by any valid ids."""

    @abstractmethod
    def decode(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """Logits [A, V] after `tokens` [A], each at its own of `positions` [A], in rows 0 .. A. A row goes on
        from where it stands, or again from where it was filled to, or from nothing."""

    @abstractmethod
    def leave(self) -> None:
        """Give up the memory of all that is kept, and what is kept with it."""

    @abstractmethod
    def come_back(self) -> None:
        """Take the memory again, for rows that are empty."""

    @abstractmethod
    def copy(self, sources: list[int], targets: list[int], width: int) -> None:
        """Copy what the first `width` tokens of rows `sources` have left to rows `targets`, as if all at
        once."""


def outgrown_window(model: PreTrainedModel, max_length: int) -> int:
    """The longest attention window or chunk that a request of `max_length` tokens can outgrow, or 0."""
    config = model.config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return max((size for size in sizes if isinstance(size, int) and size < max_length), default=0)
