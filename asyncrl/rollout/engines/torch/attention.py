"""Attention over the slot cache, plugged into transformers' own attention and mask interfaces.

The model builds its masks itself (causal, sliding window, chunked, whatever its layers need); all that
changes is that the query offset is one number per row instead of one for the batch. So any decoder whose
masks go through transformers' mask interface is right, without this package knowing its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "slot_sdpa"


def use_slot_attention(model: PreTrainedModel) -> None:
    """Switch the model to the functions of this module. They equal `sdpa` wherever no slot cache is
    involved."""
    model.set_attn_implementation(NAME)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`sdpa`, except that scores are capped where a model wants it, and that a single query position is
    attended without repeating keys and values.

    query: [B, Hq, 1, D]; key, value: [B, Hkv, L, D]. The Hq / Hkv query heads that share a key head become as
    many query positions of that head: the mask does not depend on them, and nothing of the cache is copied.
    """
    batch, heads, length, dim = query.shape
    kv_heads = key.shape[1]
    if softcap is not None:
        return _capped_attention(query, key, value, attention_mask, scaling or dim**-0.5, softcap), None
    if length != 1 or position_bias is not None or heads % kv_heads:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            position_bias=position_bias,
            **kwargs,
        )
    grouped = query.reshape(batch, kv_heads, heads // kv_heads, dim)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch, 1, heads, value.shape[-1]), None


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """[B, L, Hq, Dv] by scores of softcap * tanh(score / softcap), in float32.

    query: [B, Hq, L, D]; key, value: [B, Hkv, K, D] and Dv. mask: bool or additive [B, 1, L, K]; None means
    causal, as `sdpa` takes it.
    """
    batch, heads, length, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, -1, dim)
    scores = (grouped @ key.transpose(2, 3)).float().view(batch, heads, length, keys)
    scores = softcap * torch.tanh(scores * (scaling / softcap))
    if mask is None and length > 1:
        mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1).to(value.dtype).view(batch, kv_heads, -1, keys)
    return (weights @ value).view(batch, heads, length, -1).transpose(1, 2).contiguous()


def _mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    dtype: torch.dtype,
    q_offset: int | Tensor = 0,
    **kwargs: Any,
) -> Tensor | None:
    """`sdpa_mask`, except for a query offset per row (int64[B, 1]): then the additive mask [B, 1, q_length,
    kv_length]."""
    if not isinstance(q_offset, Tensor) or q_offset.ndim == 0:
        return sdpa_mask(
            q_length=q_length,
            kv_length=kv_length,
            mask_function=mask_function,
            dtype=dtype,
            q_offset=q_offset,
            **kwargs,
        )
    device = q_offset.device
    queries = (q_offset + torch.arange(q_length, device=device))[:, None, :, None]
    keys = torch.arange(kv_length, device=device)[None, None, None, :]
    rows = torch.arange(len(q_offset), device=device)[:, None, None, None]
    allowed = mask_function(rows, torch.zeros_like(rows[:1]), queries, keys)
    # Additive here once, or scaled_dot_product_attention makes it so again in every layer.
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(~allowed, float("-inf"))


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
