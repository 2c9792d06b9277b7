"""Llama, Mistral, Qwen2 and Qwen3 over a slot cache as plain functions of parameters, without modules.

What transformers' modules, masks and caches cost in Python is most of a step of a small model. The parameters
are the model's own, not fused copies, so that a step computes with whatever version the model has: one
product for queries, keys and values, and one for gate and up, would save 0.5% of a step of 64 or 128 rows on
a CPU, and cost a copy of most weights with every update.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from asyncrl.rollout.engines.torch.decoder import UnsupportedModelError, outgrown_window
from asyncrl.rollout.engines.torch.slot_decoder import SlotDecoder

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_SMALL = 2**17
"""Multiplications in a product of matrices, half of what OpenBLAS computes in the calling thread alone."""

_Affine = tuple[Tensor, Tensor | None]
"""Weight and bias."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """Parameters of a layer. They stay the same objects through updates, which exchange their data."""

    attention_norm: Tensor
    query: _Affine
    key: _Affine
    value: _Affine
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: _Affine
    mlp_norm: Tensor
    gate: _Affine
    up: _Affine
    down: _Affine

    @classmethod
    def of(cls, layer: nn.Module) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        normed = hasattr(attention, "q_norm")
        return cls(
            layer.input_layernorm.weight,
            _affine(attention.q_proj),
            _affine(attention.k_proj),
            _affine(attention.v_proj),
            attention.q_norm.weight if normed else None,
            attention.k_norm.weight if normed else None,
            _affine(attention.o_proj),
            layer.post_attention_layernorm.weight,
            _affine(mlp.gate_proj),
            _affine(mlp.up_proj),
            _affine(mlp.down_proj),
        )


class LeanDecoder(SlotDecoder):
    """`SlotDecoder` for the models of `FAMILIES`. Raises `UnsupportedModelError` for others."""

    def __init__(
        self, model: PreTrainedModel, slots: int, max_length: int, *, cuda_graphs: bool = False
    ) -> None:
        config, kind = model.config, type(model)
        if (
            kind.__name__ not in FAMILIES
            or not kind.__module__.startswith("transformers.")
            or config.hidden_act != "silu"
            or outgrown_window(model, max_length)
            or any("forward" in vars(module) for module in model.modules())  # somebody's own
        ):
            raise UnsupportedModelError(f"{kind.__name__} has layers that only its own modules compute")
        super().__init__(model, slots, max_length, cuda_graphs=cuda_graphs)
        body = model.model
        self._embedding = body.embed_tokens.weight
        self._layers = [_Layer.of(layer) for layer in body.layers]
        self._norm = body.norm.weight
        self._head = _affine(model.lm_head)
        self._eps = config.rms_norm_eps
        self._eps_tensor = torch.tensor(self._eps)
        self._scale = body.layers[0].self_attn.scaling
        self._cos, self._sin = _rotary_tables(model, max_length)
        # There torch's kernels for attention and norms are slower than a few plain operations, as exact in
        # float32.
        self._plain = self.device.type == "cpu" and self._embedding.dtype == torch.float32

    def _fill(self, tokens: Tensor, positions: Tensor) -> None:
        self._hidden(tokens, positions, fill=True)

    def _forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return F.linear(self._normed(self._hidden(tokens, positions), self._norm), *self._head)

    def _hidden(self, tokens: Tensor, positions: Tensor, *, fill: bool = False) -> Tensor:
        """[N * T, hidden] after the last layer, of tokens int64[N, T]. `fill`: only what the cache keeps of
        them counts, and the last layer ends with that."""
        shape = (*tokens.shape, -1, self._cos.shape[-1])  # [N, T, heads, D]
        hidden = F.embedding(tokens.reshape(-1), self._embedding)
        at = positions.reshape(-1)
        cos, sin = (F.embedding(at, table)[:, None] for table in (self._cos, self._sin))
        mask = self._mask(positions)
        for layer, cache in zip(self._layers, self.cache.layers, strict=True):
            normed = self._normed(hidden, layer.attention_norm)
            key = self._placed(normed, layer.key, layer.key_norm, cos, sin)
            value = F.linear(normed, *layer.value)
            keys, values = cache.update(key.view(shape).transpose(1, 2), value.view(shape).transpose(1, 2))
            if fill and cache is self.cache.layers[-1]:
                break
            query = self._placed(normed, layer.query, layer.query_norm, cos, sin)
            attended = self._attended(query.view(shape).transpose(1, 2), keys, values, mask)
            hidden += F.linear(attended.reshape(hidden.shape[0], -1), *layer.output)
            normed = self._normed(hidden, layer.mlp_norm)
            gate = F.silu(F.linear(normed, *layer.gate), inplace=True)
            hidden += F.linear(gate.mul_(F.linear(normed, *layer.up)), *layer.down)
        return hidden

    def _placed(
        self, hidden: Tensor, projection: _Affine, norm: Tensor | None, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """Heads [R, H, D] of a projection, normed in families that do so, rotated to their positions."""
        heads = F.linear(hidden, *projection).view(hidden.shape[0], -1, cos.shape[-1])
        return _rotated(heads if norm is None else self._normed(heads, norm), cos, sin)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Root mean square layer normalisation (Zhang and Sennrich, 2019) over the last dimension."""
        if self._plain:
            size = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
            size = torch.addcmul(self._eps_tensor, size, size, value=1 / weight.shape[0])
            return (hidden * size.rsqrt_()).mul_(weight)
        # As the modules round: to the parameters' dtype before the weight.
        return F.rms_norm(hidden, weight.shape, eps=self._eps).mul_(weight)

    def _mask(self, positions: Tensor) -> Tensor | None:
        """Additive, [N, 1, T, W]: each token attends to what is not past its position (int64[N, T]). None
        where rows begin with these tokens."""
        if (width := self.cache.width) is None:
            return None
        keys = torch.arange(width, device=self.device)
        mask = torch.zeros(*positions.shape, width, dtype=self._embedding.dtype, device=self.device)
        return mask.masked_fill_(keys > positions[..., None], float("-inf"))[:, None]

    def _attended(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[N, T, Hq, D] from query [N, Hq, T, D] and keys, values [N, Hkv, L, D]; without a mask, causal.

        Of a single position, the Hq / Hkv heads that share a key head become as many positions of it.
        """
        if mask is None or query.shape[2] > 1:
            attended = F.scaled_dot_product_attention(
                query, keys, values, mask, is_causal=mask is None, scale=self._scale, enable_gqa=True
            )
            return attended.transpose(1, 2)
        grouped = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[-1])
        if not self._plain:
            return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=self._scale)
        scores = _products(grouped.mul_(self._scale), keys.transpose(2, 3))
        return _products(scores.add_(mask).softmax(-1), values)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """a [A, H, M, K] times b [A, H, K, N] on the CPU.

    Small ones, one after the other, take NumPy's BLAS a third to a half of the time that a batch of torch's
    takes. Of large ones it is no faster, and would share them, not the batch, among threads of its own.
    """
    if torch.get_num_threads() > 1 or a[0, 0].numel() * b.shape[-1] > _SMALL:
        return a @ b
    return torch.from_numpy(np.matmul(a.numpy(), b.numpy()))


def _affine(module: nn.Module) -> _Affine:
    return module.weight, module.bias


@torch.inference_mode()
def _rotary_tables(model: PreTrainedModel, max_length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [max_length, D] as the model's own module gives them, the first half of the sines
    negated for `_rotated`."""
    positions = torch.arange(max_length, device=model.device)[None]
    cos, sin = model.model.rotary_emb(model.model.embed_tokens.weight, positions)
    first, second = sin[0].chunk(2, -1)
    return cos[0], torch.cat((-first, second), -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al., 2021) of heads [R, H, D] whose dimensions i and i + D / 2 make a pair."""
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))
