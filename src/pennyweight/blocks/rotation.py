"""Rotary positions: pairs of a head's numbers turned by angles that grow with the token's place
(Su et al. 2021, RoFormer, section 3.2.2), in the halves' order of transformers.

Only the angles are kept for backward, which turns the gradients the other way. A kernel turns queries
and keys in one launch on a GPU and in one pass on a CPU, in place where nothing is differentiated.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from pennyweight.blocks.kernels import serving

__all__ = ["rotate"]


def rotate(
    query: Float[Tensor, "1 heads tokens d"],
    key: Float[Tensor, "1 kv_heads tokens d"],
    cos: Float[Tensor, "1 tokens d"],
    sin: Float[Tensor, "1 tokens d"],
) -> tuple[Float[Tensor, "1 heads tokens d"], Float[Tensor, "1 kv_heads tokens d"]]:
    """Both turned by their tokens' angles; what was given is of no more use to anyone."""
    kernel = serving("rotation", query, key, cos, sin)
    if kernel is None:
        return _turned(query, cos[:, None], sin[:, None]), _turned(key, cos[:, None], sin[:, None])
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        turned: tuple[Tensor, Tensor] = _Rotated.apply(query, key, cos, sin, kernel)
    else:
        turned = kernel.rotate(query, key, cos, sin, in_place=True)
    return turned


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class _Rotated(torch.autograd.Function):
    """By the kernel, both ways."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, kernel: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.kernel = kernel
        ctx.save_for_backward(cos, sin)
        turned: tuple[Tensor, Tensor] = kernel.rotate(query, key, cos, sin)
        return turned

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.kernel.rotate(grad_query, grad_key, *ctx.saved_tensors, back=True)
        return *grads, None, None, None
