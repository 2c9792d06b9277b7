"""A Hugging Face decoder over a slot cache: fill rows with known tokens, decode one token per row."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from asyncrl.rollout.engines.torch.attention import use_slot_attention
from asyncrl.rollout.engines.torch.cache import LayerShape, SlotCache
from asyncrl.rollout.engines.torch.graphs import StaticDecode

WIDTH_STEP = 16
"""Attention reads the cache up to the longest row, rounded up to this: few distinct shapes, little waste."""


class UnsupportedModelError(ValueError):
    """The embedded engine cannot run this model, or could not run it exactly."""


class Decoder:
    """Rows 0 .. A of the cache decode; `fill` writes any rows. Arrays of the host go in, logits on the device
    come out.

    cuda_graphs: decode by CUDA graphs (see `StaticDecode`). The model's weights must then stay where they
        are.
    """

    def __init__(
        self, model: PreTrainedModel, slots: int, max_length: int, *, cuda_graphs: bool = False
    ) -> None:
        self.model = model
        self.device = model.device
        self.vocab_size = int(model.get_output_embeddings().weight.shape[0])
        accepted = inspect.signature(model.forward).parameters
        if "position_ids" not in accepted:
            raise UnsupportedModelError(
                f"{type(model).__name__}.forward takes no position_ids, so its rows cannot stand at "
                f"different positions"
            )
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        use_slot_attention(model)
        with torch.inference_mode():
            shapes = _layer_shapes(model)
        parameter = next(model.parameters()).detach()
        self.cache = SlotCache(shapes, slots, max_length, like=parameter)
        if cuda_graphs and outgrown_window(model, max_length):
            raise UnsupportedModelError(
                f"{type(model).__name__} attends to a window of its last tokens, in which the padding rows "
                "of a CUDA graph would see nothing; set rollout.torch.cuda_graphs=false"
            )
        self._step = self._decode
        if cuda_graphs:
            self._step = StaticDecode(self._decode, slots, max_length, self.device, WIDTH_STEP)

    @torch.inference_mode()
    def fill(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> None:
        """Compute and keep the keys and values of `tokens` [N, T] as the first T of `rows` [N].

        Shorter rows are padded on the right with any valid id: what that writes lies past the row's position,
        is masked, and is overwritten when the row gets there.
        """
        self.cache.fill(self._upload(rows))
        positions = torch.arange(tokens.shape[1], device=self.device).expand(tokens.shape)
        self._forward(self._upload(tokens), positions)

    @torch.inference_mode()
    def decode(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        """Logits [A, V] after `tokens` [A], each at its own of `positions` [A], in rows 0 .. A."""
        width = -(-(int(positions.max()) + 1) // WIDTH_STEP) * WIDTH_STEP
        return self._step(self._upload(tokens), self._upload(positions), min(width, self.cache.max_length))

    @torch.inference_mode()
    def copy(self, sources: list[int], targets: list[int], width: int) -> None:
        """Copy the first `width` keys and values of rows `sources` to rows `targets`, as if all at once."""
        self.cache.copy(self._upload(np.asarray(sources)), self._upload(np.asarray(targets)), width)

    def _decode(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        self.cache.decode(positions, width)
        return self._forward(tokens[:, None], positions[:, None])[:, -1]

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **self._last_only,
        ).logits

    def _upload(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


def outgrown_window(model: PreTrainedModel, max_length: int) -> int:
    """The longest attention window or chunk that a request of `max_length` tokens can outgrow, or 0."""
    config = model.config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return max((size for size in sizes if isinstance(size, int) and size < max_length), default=0)


def _layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """What each layer caches per token, seen in a forward of one token."""
    seen = DynamicCache()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    name = type(model).__name__
    try:
        model(input_ids=token, past_key_values=seen, use_cache=True)
    except (AttributeError, ValueError, TypeError) as error:
        raise UnsupportedModelError(f"{name} does not run over a plain key-value cache: {error}") from error
    shapes = []
    for i, layer in enumerate(seen.layers):
        keys, values = layer.keys, layer.values
        if type(layer) is not DynamicLayer or keys is None or values is None or keys.shape[2] != 1:
            raise UnsupportedModelError(
                f"{name}: layer {i} keeps a {type(layer).__name__}, not one key and value per token"
            )
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3]))
    if not shapes:
        raise UnsupportedModelError(f"{name} keeps no keys and values: it is no attention decoder")
    return shapes
