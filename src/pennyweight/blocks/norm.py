"""RMSNorm with a frozen weight: y = w x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019, section 3).

Plain autograd keeps the input, its float32 copy and the normalized rows. Backward needs the input
and one number a row: with n = x / rms and g = w dy, dx = (g - n mean(g n)) / rms. A kernel does each
way in one launch on a GPU, and in one pass on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pennyweight.blocks.kernels import serving
from pennyweight.lora.formed import forms

__all__ = ["RMSNorm"]


class RMSNorm(nn.Module):
    """Rows over their root mean square, in at least float32.

    Llama casts the normalized rows before it multiplies by the weight; Gemma multiplies by
    1 + weight in float32 and casts then (`wide_weight`).
    """

    def __init__(self, weight: nn.Parameter, eps: float, *, wide_weight: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.wide_weight = weight, eps, wide_weight

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        frozen = not self.weight.requires_grad
        if frozen and torch.is_grad_enabled() and x.requires_grad:
            scaled, inverse = _FrozenNorm.apply(x, self)
            return forms(scaled, x, inverse, by=self.scaled)
        if frozen and (kernel := serving("norm", x, self.weight)) is not None:
            y: Tensor = kernel.norm(x, self.weight, self.eps, wide=self.wide_weight)[0]
            return y
        wide = _wide(x)
        return self.weigh(wide * self.inverse_rms(wide), x.dtype)

    def inverse_rms(self, wide: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
        """1 / sqrt(mean(x^2) + eps) of each row."""
        return torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)

    def scaled(self, x: Tensor, inverse: Tensor) -> Tensor:
        """The output, from the input and 1/rms of each row."""
        if (kernel := serving("norm", x, self.weight)) is not None:
            y: Tensor = kernel.scaled(x, self.weight, inverse, wide=self.wide_weight)
            return y
        return self.weigh(_wide(x) * inverse, x.dtype)

    def weigh(self, normalized: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalized rows times the weight, in `dtype`."""
        if self.wide_weight:
            return (normalized * (1.0 + self.weight.to(normalized.dtype))).to(dtype)
        return self.weight * normalized.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class _FrozenNorm(torch.autograd.Function):
    """A norm's output; its input and one number a row are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        if (kernel := serving("norm", x, norm.weight)) is not None:
            y, inverse = kernel.norm(x, norm.weight, norm.eps, wide=norm.wide_weight)
        else:
            inverse = norm.inverse_rms(_wide(x))
            y = norm.scaled(x, inverse)
        ctx.norm = norm
        ctx.save_for_backward(x, inverse)
        ctx.mark_non_differentiable(inverse)
        return y, inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor, None]:
        x, inverse = ctx.saved_tensors
        norm: RMSNorm = ctx.norm
        if (kernel := serving("norm", x, norm.weight)) is not None:
            return kernel.norm_back(grad_y, x, norm.weight, inverse, wide=norm.wide_weight), None
        weight = norm.weight.to(inverse.dtype)
        normalized = _wide(x) * inverse
        g = _wide(grad_y) * (1.0 + weight if norm.wide_weight else weight)
        along = (g * normalized).mean(-1, keepdim=True)
        grad_x = g.sub_(normalized.mul_(along)).mul_(inverse)
        return grad_x.to(x.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
