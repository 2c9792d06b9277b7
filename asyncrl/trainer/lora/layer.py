"""A linear layer whose weight is a base and an adapter, merged, and whose adapter alone is trained.

The forward pass is the plain product with the merged weight, so that trainer and engines compute with the
same numbers. (Base and adapter computed apart, as is usual, round in another way than a merged engine;
docs/lora.md has it measured.) The gradients of A and B come from the layer's inputs and output gradients by
way of r numbers a token, as they would there: the gradient of the whole weight is never made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class AdaptedLinear(nn.Linear):
    """Takes the place of a layer's class. Its weight and bias are frozen."""

    lora: tuple[nn.Parameter, nn.Parameter, float]
    """A [r, in], B [out, r], and what B A is multiplied with."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return linear(x, self.weight, self.bias)
        return _MergedProduct.apply(x, self.weight, self.bias, *self.lora)


class _MergedProduct(torch.autograd.Function):
    """y = x Wᵀ + bias, with W = base + s B A, and of W only A and B have gradients: with G = dL/dy they are
    dL/dB = s Gᵀ (x Aᵀ) and dL/dA = s (G B)ᵀ x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, a, b = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        rows, of_rows = x.flatten(0, -2), grad.flatten(0, -2)
        grad_a = (of_rows @ b).mul_(ctx.scale).T @ rows
        grad_b = of_rows.T @ (rows @ a.T).mul_(ctx.scale)
        return grad_x, None, None, grad_a, grad_b, None
