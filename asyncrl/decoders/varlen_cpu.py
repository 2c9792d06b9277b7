"""torch's operators for attention over sequences of any length, which it has for GPUs only, on the CPU.

A plain reference, sequence by sequence, so that all that surrounds the kernel can be tried out and tested
without a GPU. Computes in float32, or in float64 where that is given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    *unused: Any,
    **also_unused: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out[Tq, H, D], log-sum-exp[H, Tq], state of the unused generator) of query [Tq, H, D], key and value
    [Tk, Hkv, D]."""
    out, lse = torch.zeros_like(query), _precise(query).new_zeros(query.shape[1], len(query))
    for q_at, k_at in _sequences(cu_seq_q, cu_seq_k):
        q, k, v = (_heads(t, query.shape[1]) for t in (query[q_at], key[k_at], value[k_at]))
        scores = _scores(q, k, scale, window_size)
        lse[:, q_at] = scores.logsumexp(-1)
        out[q_at] = ((scores - lse[:, q_at, None]).exp() @ v).transpose(0, 1).to(out.dtype)
    return out, lse, torch.zeros(2, dtype=torch.uint64)


def backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (Dao et al. 2022, arXiv 2205.14135, appendix B.2)."""
    heads = query.shape[1]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    dq, dk, dv = (torch.zeros_like(t) for t in (query, key, value))
    for q_at, k_at in _sequences(cu_seq_q, cu_seq_k):
        q, k, v, do, o = (
            _heads(t, heads) for t in (query[q_at], key[k_at], value[k_at], grad_out[q_at], out[q_at])
        )
        weights = (_scores(q, k, scale, window_size) - lse[:, q_at, None]).exp()
        d_scores = weights * (do @ v.transpose(1, 2) - (do * o).sum(-1, keepdim=True)) * factor
        dq[q_at] = (d_scores @ k).transpose(0, 1).to(dq.dtype)
        dk[k_at] = _grouped(d_scores.transpose(1, 2) @ q, key.shape[1]).to(dk.dtype)
        dv[k_at] = _grouped(weights.transpose(1, 2) @ do, key.shape[1]).to(dv.dtype)
    return dq, dk, dv


def _sequences(q_starts: Tensor, k_starts: Tensor) -> Iterator[tuple[slice, slice]]:
    q, k = q_starts.tolist(), k_starts.tolist()
    for i in range(len(q) - 1):
        yield slice(q[i], q[i + 1]), slice(k[i], k[i + 1])


def _precise(states: Tensor) -> Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _heads(states: Tensor, heads: int) -> Tensor:
    """[heads, T, D] of [T, h, D], each of the h heads repeated for those that it serves."""
    return _precise(states).transpose(0, 1).repeat_interleave(heads // states.shape[1], 0)


def _grouped(gradient: Tensor, heads: int) -> Tensor:
    """[T, heads, D] of [H, T, D]: summed over the heads that one served."""
    return gradient.unflatten(0, (heads, -1)).sum(1).transpose(0, 1)


def _scores(q: Tensor, k: Tensor, scale: float | None, window_size: list[int] | None) -> Tensor:
    """[H, Tq, Tk], -inf where a query does not see a key. The last query stands beside the last key."""
    left, right = window_size or (-1, -1)
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    offset = k.shape[1] - q.shape[1]
    distance = torch.arange(k.shape[1])[None] - torch.arange(q.shape[1])[:, None] - offset
    seen = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        seen &= distance >= -left
    if right >= 0:
        seen &= distance <= right
    return scores.masked_fill(~seen, float("-inf"))
