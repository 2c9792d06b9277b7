"""KL(p ‖ q) of two policies over the whole vocabulary, straight from hidden states, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asyncrl.core.kept import KeptSets
from asyncrl.trainer.kernels.logprob import bound, chunks, head_logits, leave_out, through_head
from asyncrl.trainer.models.policy import FusedHead


@dataclass(frozen=True, slots=True)
class DivergenceFrom:
    """A `Reading`: how far the policy is from a frozen one, which has `hidden` states ([N, H'], without
    gradient) and a `head` of its own.

    Both distributions are taken at the sampling temperature and over the same tokens: the `kept` ones, or all
    of the policy's vocabulary (whatever the other's may be padded to).
    """

    hidden: Tensor
    head: FusedHead

    def __call__(self, hidden: Tensor, head: FusedHead, kept: KeptSets | None) -> Tensor:
        return _ChunkedDivergence.apply(hidden, head.weight, head.bias, head, self, kept)


class _ChunkedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: FusedHead,
        other: DivergenceFrom,
        kept: KeptSets | None,
    ) -> Tensor:
        ctx.shape, ctx.temperature, ctx.chunk_tokens = head.shape, head.temperature, head.chunk_tokens
        ctx.kept, ctx.other = kept, other
        precise = torch.promote_types(hidden.dtype, torch.float32)
        result = torch.empty(len(hidden), dtype=precise, device=hidden.device)
        for chunk in chunks(len(hidden), ctx.chunk_tokens):
            log_p = log_probs(hidden, weight, bias, head, kept, chunk)
            result[chunk] = log_p.exp().mul_(log_p.sub_(_other_log_probs(ctx, chunk, len(weight)))).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """With p = softmax(z): d KL / dz_j = p_j (log p_j - log q_j - KL)."""
        _, weight, _, divergence = ctx.saved_tensors

        def gradient(logits: Tensor, chunk: slice) -> Tensor:
            log_p = logits.log_softmax(-1)
            p = log_p.exp()
            gap = log_p.sub_(_other_log_probs(ctx, chunk, len(weight))).sub_(divergence[chunk, None])
            return p.mul_(gap).mul_(grad[chunk, None])

        return through_head(ctx, divergence.dtype, gradient)


def _other_log_probs(ctx: Any, chunk: slice, vocabulary: int) -> Tensor:
    """float32[n, V]: log q."""
    head = ctx.other.head
    bias = None if head.bias is None else head.bias[:vocabulary]
    return log_probs(ctx.other.hidden, head.weight[:vocabulary], bias, head, ctx.kept, chunk)


def log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, head: FusedHead, kept: KeptSets | None, chunk: slice
) -> Tensor:
    """float32[n, V]: of a chunk of `hidden` states, by these rows of the head."""
    logits = head_logits(hidden[chunk], weight, bias, head.shape, head.temperature)
    bound(logits, bias)
    leave_out(logits, kept, chunk)
    return logits.log_softmax(-1)
