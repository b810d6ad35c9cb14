"""Layers that read the same rows, such as q, k and v, by one call each way where products of bf16 take
all of them and their adapters along; elsewhere one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pennyweight.lora.along import Along, kernels_for, layer_along
from pennyweight.lora.formed import kept
from pennyweight.lora.layer import LoraLinear

__all__ = ["abreast", "along_of"]


def abreast(
    layers: Sequence[nn.Module], x: Float[Tensor, "*rows d_in"]
) -> tuple[Float[Tensor, "*rows _"], ...]:
    """What each of the layers makes of x."""
    if (taken := along_of(layers, x)) is None:
        return tuple(layer(x) for layer in layers)
    made: tuple[Tensor, ...] = _Abreast.apply(x, taken, *taken.masters)
    return made


def along_of(layers: Sequence[nn.Module], x: Tensor) -> Along | None:
    """The layers for one call over rows of x's type and number, whose gradients are kept; None where a
    layer does not fit, or has other adapters than one without dropout for all of the rows."""
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return None
    if (kernels := kernels_for(x)) is None:
        return None
    found = []
    for layer in layers:
        base, beside = layer, None
        if isinstance(layer, LoraLinear):
            base, updates = layer.base_layer, layer.updates(x)
            if len(updates) > 1 or (updates and (beside := updates[0].beside(x)) is None):
                return None
        if (one := layer_along(kernels, base, x, beside)) is None:
            return None
        found.append(one)
    return Along(kernels, tuple(found))


class _Abreast(torch.autograd.Function):
    """Outputs of all the layers. Kept for backward: A x of each, and the input, or what it is formed
    from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: Along, *masters: Tensor) -> tuple[Tensor, ...]:
        outputs, narrow = taken.product(x)
        parts, ctx.kept = kept(x)
        ctx.taken = taken
        ctx.save_for_backward(*parts, *narrow)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow = ctx.kept.again(ctx.saved_tensors)
        of_x, of_masters = ctx.taken.gradients(grads, x, narrow, of_x=ctx.needs_input_grad[0])
        return of_x, None, *of_masters
