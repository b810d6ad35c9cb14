"""A frozen linear layer and an adapter as one product each way (the K-extension).

The dequantization buffer is ours, so the adapter can stand in it beside the weight:

    E = [ W   sB ]      forward:        y  = [x | xA^T] E[:d_out]^T      = xW^T + s xA^T B^T
        [ A    0 ]      input gradient: dx = [g | g sB] E[:, :d_in]      = gW + s gB A

r more columns in products of thousands, in place of four more passes over rows as wide as x and y.
The rows [x | xA^T] are a buffer, too: x is copied into it here; what makes x can write it there.
Which of the two ways is faster is for a GPU to say (`benchmarks/gpu.py` measures both); until one
has, no layer takes this one.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from pennyweight.quant import Quantized4Bit, dequantize_4bit_part

__all__ = ["extended_product"]


def extended_product(
    x: Float[Tensor, "rows d_in"],
    value: Quantized4Bit,
    a: Float[Tensor, "r d_in"],
    b: Float[Tensor, "d_out r"],
    scaling: float,
) -> Float[Tensor, "rows d_out"]:
    """x W^T + scaling * x A^T B^T in x's type, W frozen; gradients for x, A and B."""
    y: Tensor = _Extended.apply(x, value, a, b, scaling)
    return y


class _Extended(torch.autograd.Function):
    """Keeps [x | xA^T]; the weight is dequantized again for backward, never kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, value: Quantized4Bit, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        extended, scaled = _beside(x, x @ a.to(x.dtype).T), b.to(x.dtype) * scaling
        ctx.value, ctx.scaling, ctx.dtypes = value, scaling, (a.dtype, b.dtype)
        ctx.save_for_backward(extended, a, b)
        d_out, d_in = value.shape
        weight = x.new_empty(d_out, extended.shape[1])
        dequantize_4bit_part(value, weight[:, :d_in])
        weight[:, d_in:] = scaled
        return extended @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        extended, a, b = ctx.saved_tensors
        d_out, d_in = ctx.value.shape
        narrow = grad_y @ (b.to(grad_y.dtype) * ctx.scaling)
        grad_a = narrow.T @ extended[:, :d_in]
        grad_b = (grad_y.T @ extended[:, d_in:]) * ctx.scaling
        grad_x = None
        if ctx.needs_input_grad[0]:
            weight = grad_y.new_empty(d_out + len(a), d_in)
            dequantize_4bit_part(ctx.value, weight[:d_out])
            weight[d_out:] = a.to(grad_y.dtype)
            grad_x = _beside(grad_y, narrow) @ weight
        of_a, of_b = ctx.dtypes
        return grad_x, None, grad_a.to(of_a), grad_b.to(of_b), None


def _beside(wide: Tensor, narrow: Tensor) -> Tensor:
    return torch.cat([wide, narrow], dim=1)
