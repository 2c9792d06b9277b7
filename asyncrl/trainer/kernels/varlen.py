"""Attention by torch's kernel for sequences of any length: no padding, no mask, no repeated heads.

Plugged into transformers' attention interface under the name `varlen`. No mask function is registered for it,
so transformers builds no mask; who sees whom is in the `Pieces` that reach the function as the keyword
argument `pieces`. Without them every row is a sequence of its own.

A shared prompt needs no mask either. Attention to two sets of keys is that to each of them, weighted by the
share that each has of the softmax's denominator (Milakov & Gimelshein 2018, arXiv 1805.02867): the kernel
runs once over the pieces, and once more for the tokens after a shared prompt over that prompt.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from asyncrl.decoders import varlen_cpu
from asyncrl.errors import AsyncRLError
from asyncrl.trainer.packing.pieces import Pieces, SharedPrompts, whole_rows

NAME = "varlen"

try:
    from torch.nn.attention import varlen as _kernel

    AVAILABLE = "enable_gqa" in inspect.signature(_kernel.varlen_attn).parameters
except ImportError:
    AVAILABLE = False
"""Whether this torch has the kernel, with grouped heads (2.13 has)."""

FULL = [-1, -1]
CAUSAL = [-1, 0]

_CHANGES_SCORES = ("softcap", "s_aux", "position_bias")
"""What other kernels are told of in a layer that does more than plain attention."""


class VarlenError(AsyncRLError):
    """A layer asks for attention that the kernel does not compute."""


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    pieces: Pieces | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Of R rows of L tokens: float[R, L, H, D]. query: float[R, H, L, D]; key, value: float[R, Hkv, L, D],
    each head of which serves H / Hkv heads of the query. Raises `VarlenError`."""
    rows, _, tokens, _ = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    extra = [name for name in _CHANGES_SCORES if kwargs.get(name) is not None]
    extra += ["a mask of its own"] * (attention_mask is not None) + ["dropout"] * (dropout > 0)
    extra += ["no causality"] * (not causal) + ["other value heads"] * (value.shape != key.shape)
    if extra:
        raise VarlenError(f"{type(module).__name__} wants {', '.join(extra)}, which `{NAME}` cannot compute")
    if pieces is None:
        pieces = whole_rows(rows, tokens, query.device)
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if pieces.shared is None:
        window = CAUSAL if sliding_window is None else [sliding_window - 1, 0]
        out, _ = _forward(q, k, v, _to_itself(pieces, window), scale)
    elif sliding_window is None:
        out = _WithSharedPrompts.apply(q, k, v, pieces, scale)
    else:
        raise VarlenError(f"{type(module).__name__} has a window, beyond which it sees no shared prompt")
    return out.unflatten(0, (rows, tokens)), None


if AVAILABLE:
    AttentionInterface.register(NAME, varlen_attention)
    _kernel._varlen_attn.register_kernel("cpu", varlen_cpu.forward)
    _kernel._varlen_attn_backward.register_kernel("cpu", varlen_cpu.backward)


class _WithSharedPrompts(torch.autograd.Function):
    """The kernel's own backward pass gives no gradient of the log-sum-exp, by which the two results are
    joined, and needs none: with the joined output and log-sum-exp in place of its own, it computes each set
    of keys' share of the gradient (as in ring attention, Liu et al. 2023, arXiv 2310.01889)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, scale: float) -> Tensor:
        assert pieces.shared is not None
        shared = pieces.shared
        at, prompt = shared.queries, shared.keys
        out, lse = _forward(q, k, v, _to_itself(pieces, CAUSAL), scale)
        more, more_lse = _forward(q[at], k[prompt], v[prompt], _to_prompts(shared), scale)
        own_lse = lse[:, at]
        joined = torch.logaddexp(own_lse, more_lse)
        share, more_share = (_weights(part, joined) for part in (own_lse, more_lse))
        out[at] = (out[at] * share + more * more_share).to(out.dtype)
        lse[:, at] = joined
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.pieces, ctx.scale = pieces, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        shared = ctx.pieces.shared
        at, prompt = shared.queries, shared.keys
        dq, dk, dv = _backward((grad, q, k, v, out, lse), _to_itself(ctx.pieces, CAUSAL), ctx.scale)
        of_queries = (grad[at], q[at], k[prompt], v[prompt], out[at], lse[:, at].contiguous())
        more = _backward(of_queries, _to_prompts(shared), ctx.scale)
        for of_all, of_some, where in zip((dq, dk, dv), more, (at, prompt, prompt), strict=True):
            of_all.index_add_(0, where, of_some)
        return dq, dk, dv, None, None


def _weights(lse: Tensor, joined: Tensor) -> Tensor:
    """float32[T, H, 1]: the share of the softmax's denominator, from log-sum-exps [H, T]."""
    return (lse - joined).exp().t()[..., None]


class _Sight(NamedTuple):
    """Who sees whom: the tokens of each query piece those of the key piece of the same number."""

    q_starts: Tensor
    k_starts: Tensor
    longest_q: int
    longest_k: int
    window: list[int]


def _to_itself(pieces: Pieces, window: list[int]) -> _Sight:
    return _Sight(pieces.starts, pieces.starts, pieces.longest, pieces.longest, window)


def _to_prompts(shared: SharedPrompts) -> _Sight:
    return _Sight(shared.query_starts, shared.key_starts, shared.longest_queries, shared.longest_keys, FULL)


def _forward(q: Tensor, k: Tensor, v: Tensor, sight: _Sight, scale: float) -> tuple[Tensor, Tensor]:
    """(out[Tq, H, D], log-sum-exp float32[H, Tq])."""
    *spans, window = sight
    causal = window == CAUSAL
    out, lse, _ = torch.ops.torch_attn._varlen_attn(q, k, v, *spans, causal, scale, window, enable_gqa=True)
    return out, lse


def _backward(tensors: tuple[Tensor, ...], sight: _Sight, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. tensors: the gradient of out, q, k, v, out, log-sum-exp."""
    *spans, window = sight
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=tensors[0].device)
    return torch.ops.torch_attn._varlen_attn_backward(
        *tensors, *spans, window == CAUSAL, no_dropout, scale, window
    )
