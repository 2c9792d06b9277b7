"""Log-probabilities and entropies straight from hidden states, never holding more than a chunk of logits.

At a vocabulary of 150k, the float32 logits of one 8k-token micro-batch are 4.9 GB, and autograd would keep
several such tensors. Here the logits of `chunk_tokens` tokens exist at a time, forward and backward; the
backward pass computes them again.

Beside its inputs and results the head holds, with n tokens a chunk: 2·4·n·V bytes in the forward pass; in the
backward pass (4 + 2)·n·V with bfloat16 inputs, or 2·4·n·V where the entropy has a gradient, 4·n·V more where
logits are capped, and the weight's gradient, summed in float32 (4·V·H) and then rounded to its dtype. In both
passes, n·V more where there are kept sets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from asyncrl.core.kept import KeptSets


@dataclass(frozen=True, slots=True)
class LogitShape:
    """What a model makes of its head's output z: scale · z, softly capped to cap · tanh(scale · z / cap)
    where there is a cap (Gemma 2, arXiv 2408.00118)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Of the head's output, of any shape."""
        scaled = logits * self.scale
        return scaled if self.cap is None else self.cap * (scaled / self.cap).tanh()


AS_THEY_ARE = LogitShape()
_OUTSIDE = -1e9
"""A logit of probability 0. Finite, since 0 times it must be 0 in entropies and gradients."""


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    head_bias: Tensor | None = None,
    shape: LogitShape = AS_THEY_ARE,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
    kept: KeptSets | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and entropy of p = softmax(shape(hidden @ head_weight.T + head_bias) / temperature).

    hidden: float[N, H]. head_weight: float[V, H], head_bias: float[V], of the same dtype (float32, bfloat16,
    float64). targets: int64[N]. Returns (logprobs[N], entropy[N]) in nats, float32 (float64 for float64
    inputs), both differentiable with respect to hidden, weight and bias. kept: a set for each of the N, over
    which p is renormalised, and outside which it is 0; a target lies in its set.

    Whatever the inputs' dtype, logits are float32 from their products on: the rounding of a logit near 20 to
    bfloat16 would change a probability by up to 6%. The gradient of the logits is rounded to the inputs'
    dtype before it is multiplied; the gradients of weight and bias are summed in float32.
    """
    if temperature <= 0:
        raise ValueError(
            f"temperature is {temperature}; log-probabilities exist for temperatures above 0 only"
        )
    logprobs, entropy = _ChunkedHead.apply(
        hidden, head_weight, head_bias, targets, shape, temperature, chunk_tokens, kept
    )
    return logprobs, entropy


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: LogitShape,
        temperature: float,
        chunk_tokens: int,
        kept: KeptSets | None,
    ) -> tuple[Tensor, Tensor]:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = torch.empty(len(targets), dtype=precise, device=hidden.device)
        lse, entropy = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for chunk in chunks(len(targets), chunk_tokens):
            logits = head_logits(hidden[chunk], weight, bias, shape, temperature)
            leave_out(logits, kept, chunk)
            lse[chunk] = logits.logsumexp(-1)
            log_probs = logits.sub_(lse[chunk, None])
            logprobs[chunk] = log_probs.gather(-1, targets[chunk, None]).squeeze(-1)
            bound(log_probs, bias)
            entropy[chunk] = log_probs.exp().mul_(log_probs).sum(-1).neg_()
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.shape, ctx.temperature, ctx.chunk_tokens, ctx.kept = shape, temperature, chunk_tokens, kept
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Any, ...]:
        *_, targets, lse, entropy = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(lse)

        def gradient(logits: Tensor, chunk: slice) -> Tensor:
            of_entropy = None if grad_entropy is None else grad_entropy[chunk]
            return _logit_gradient(
                logits, targets[chunk], lse[chunk], entropy[chunk], grad_logprobs[chunk], of_entropy
            )

        return through_head(ctx, lse.dtype, gradient)


def through_head(
    ctx: Any, dtype: torch.dtype, gradient: Callable[[Tensor, slice], Tensor]
) -> tuple[Any, ...]:
    """What a function of a head's inputs gives back, of which `ctx` keeps (hidden, weight, bias, ...) and the
    settings of `head_logits`. gradient: with respect to the logits [n, V] of a chunk, which it may overwrite;
    these are sums in `dtype`."""
    hidden, weight, bias, *_ = ctx.saved_tensors
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
    grad_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None
    for chunk in chunks(len(hidden), ctx.chunk_tokens):
        logits = head_logits(hidden[chunk], weight, bias, ctx.shape, ctx.temperature)
        slope = _slope(logits, ctx.shape, ctx.temperature)
        bound(logits, bias)
        leave_out(logits, ctx.kept, chunk)
        grad = gradient(logits, chunk).mul_(slope)
        del logits, slope  # whose memory the products below need
        if grad_bias is not None:
            grad_bias += grad.sum(0)
        grad = grad.to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(grad, weight, out=grad_hidden[chunk])
        if grad_weight is not None:
            _add_product(grad_weight, grad.T, hidden[chunk])
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(bias.dtype),
        *(None for _ in ctx.needs_input_grad[3:]),
    )


def chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: LogitShape, temperature: float
) -> Tensor:
    """[n, V] in float32 (or float64), divided by the temperature."""
    logits = _product(hidden, weight.T)
    if bias is not None:
        logits += bias
    if shape.cap is not None:
        return logits.mul_(shape.scale / shape.cap).tanh_().mul_(shape.cap / temperature)
    factor = shape.scale / temperature
    return logits if factor == 1 else logits.mul_(factor)


def bound(logits: Tensor, bias: Tensor | None) -> None:
    """Make finite what a bias of -inf has masked: 0 times it must be 0."""
    if bias is not None:
        logits.clamp_(min=_OUTSIDE)


def leave_out(logits: Tensor, kept: KeptSets | None, chunk: slice) -> None:
    """Give what is outside the kept sets a probability, and a gradient, of 0."""
    if kept is None:
        return
    here = kept.take(np.arange(chunk.start, chunk.stop))
    rows = torch.from_numpy(np.repeat(np.arange(len(logits)), here.sizes)).to(logits.device)
    ids = torch.from_numpy(here.ids).to(logits.device).long()
    inverted = ids < 0
    others = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    others[rows] = ~inverted  # one value for all ids of a set
    outside = others[:, None].repeat(1, logits.shape[-1])
    outside[rows, torch.where(inverted, ~ids, ids)] = inverted
    logits.masked_fill_(outside, _OUTSIDE)


def _slope(logits: Tensor, shape: LogitShape, temperature: float) -> Tensor | float:
    """What a change of the head's output changes `_logits` by: d tanh(x) / dx = 1 - tanh(x)²."""
    factor = shape.scale / temperature
    if shape.cap is None:
        return factor
    return logits.mul(temperature / shape.cap).square_().neg_().add_(1).mul_(factor)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of two matrices of one dtype, in float32 (or float64) without a rounding on the way there."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.device.type == "cpu":  # whose kernels have no other result than their inputs' dtype
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += `_product(a, b)`, in the accumulators of the product itself."""
    if a.dtype in (torch.float32, torch.float64):
        total.addmm_(a, b)
    elif a.device.type == "cpu":
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _logit_gradient(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient with respect to `logits` [n, V], which it overwrites.

    With p = softmax(z): d log p_t / dz_j = 1[j = t] - p_j and dH / dz_j = -p_j (log p_j + H).
    """
    log_probs = logits.sub_(lse[:, None])
    if grad_entropy is None:
        grad = log_probs.exp_().mul_(-grad_logprobs[:, None])
    else:
        grad = log_probs.exp()
        factor = log_probs.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(grad_logprobs[:, None])
        grad.mul_(factor.neg_())
    return grad.scatter_add_(1, targets[:, None], grad_logprobs[:, None])
