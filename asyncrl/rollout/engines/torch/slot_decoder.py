"""A Hugging Face decoder over a slot cache: all rows in one forward."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from asyncrl.decoders.forward import accepted
from asyncrl.rollout.engines.torch.attention import use_slot_attention
from asyncrl.rollout.engines.torch.cache import LayerShape, SlotCache
from asyncrl.rollout.engines.torch.decoder import Decoder, UnsupportedModelError

WIDTH_STEP = 16
"""Attention reads the cache up to the longest row, rounded up to this: few distinct shapes, little waste."""


class SlotDecoder(Decoder):
    """`Decoder` whose rows are those of a `SlotCache`. Raises `UnsupportedModelError` for a model whose
    class or layers keep something else than a key and value per token.

    cuda_graphs: decode by CUDA graphs (see `StaticDecode`). The model's weights must then stay where they
        are.
    """

    keeps_prefixes = True

    def __init__(
        self, model: PreTrainedModel, slots: int, max_length: int, *, cuda_graphs: bool = False
    ) -> None:
        shapes = _layer_shapes(model)
        super().__init__(model, slots, max_length)
        use_slot_attention(model)
        self._shapes = shapes
        self.come_back()
        self._packs = self.device.type == "cpu" and not cuda_graphs
        self._step = self._decode
        if cuda_graphs:
            from asyncrl.rollout.engines.torch.graphs import StaticDecode

            self._step = StaticDecode(self._decode, slots, max_length, self.device, WIDTH_STEP)

    def leave(self) -> None:
        self.cache = SlotCache([], 0, 0, like=next(self.model.parameters()))

    def come_back(self) -> None:
        like = next(self.model.parameters()).detach()
        self.cache = SlotCache(self._shapes, self.slots, self.max_length, like=like)
        self._held = np.zeros(self.slots, np.int64)
        """Of how many tokens each row keeps what it has of them."""

    @torch.inference_mode()
    def fill(self, rows: NDArray[np.int64], tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """What padding writes lies past the row's position, is masked, and is overwritten when the row gets
        there."""
        self._held[rows] = lengths
        self._make_room()
        starts = np.maximum(lengths - tokens.shape[1], 0)
        positions = self._upload(starts[:, None] + np.arange(tokens.shape[1]))
        if starts.any():
            self.cache.go_on(self._upload(rows), positions, self._width(int(lengths.max())))
        else:
            self.cache.fill(self._upload(rows))
        self._fill(self._upload(tokens), positions)

    @torch.inference_mode()
    def decode(self, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> Tensor:
        self._held[: len(positions)] = positions + 1
        self._make_room()
        width = self._width(int(positions.max()) + 1)
        return self._step(self._upload(tokens), self._upload(positions), width)

    @torch.inference_mode()
    def copy(self, sources: list[int], targets: list[int], width: int) -> None:
        self._held[targets] = np.minimum(self._held[sources], width)
        self.cache.copy(self._upload(np.asarray(sources)), self._upload(np.asarray(targets)), width)

    def _width(self, tokens: int) -> int:
        return min(-(-tokens // WIDTH_STEP) * WIDTH_STEP, self.max_length)

    def _make_room(self) -> None:
        """On a CPU, lay the cache out for the longest row, so that what attention reads is almost one piece:
        of short pieces far apart it reads a third as fast."""
        width = self._width(int(self._held.max()))
        if self._packs and not width <= self.cache.room < 2 * width:
            self.cache.lay_out(min(width + width // 128 * WIDTH_STEP, self.max_length))

    def _decode(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        self.cache.decode(positions, width)
        return self._forward(tokens[:, None], positions[:, None])

    def _fill(self, tokens: Tensor, positions: Tensor) -> None:
        self._forward(tokens, positions)

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [N, V] after the last of tokens int64[N, T]."""
        return self.model(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **self._last_only,
        ).logits[:, -1]

    def _upload(self, array: NDArray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)


@torch.inference_mode()
def _layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """What each layer caches per token, seen in a forward of one token."""
    name = type(model).__name__
    if model._is_stateful or any(DynamicCache(config=model.config).is_linear):
        raise UnsupportedModelError(f"{name} keeps a recurrent state, not only a key and value per token")
    if not model._supports_sdpa or not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name} does not take its attention from transformers' attention interface (sdpa)"
        )
    if "position_ids" not in accepted(model):
        raise UnsupportedModelError(
            f"{name} takes no position_ids, so that rows at different positions cannot share a forward"
        )
    seen = DynamicCache()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    try:
        model(input_ids=token, past_key_values=seen, use_cache=True)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # of the machine, not of the model
    except Exception as error:
        raise UnsupportedModelError(f"{name} does not run over a plain key-value cache: {error}") from error
    shapes = []
    for i, layer in enumerate(seen.layers):
        keys, values = layer.keys, layer.values
        if keys is None or values is None or keys.shape[2] != 1:
            raise UnsupportedModelError(
                f"{name}: layer {i} keeps something else than a key and value per token"
            )
        shapes.append(LayerShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3]))
    if not shapes:
        raise UnsupportedModelError(f"{name} keeps no keys and values: it is no attention decoder")
    return shapes
