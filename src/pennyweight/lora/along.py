"""Products of bf16 that take an adapter along, on a CPU that has them: one call forward, one back.

With the adapter's part in the same sums, y = W x + b + s B (A x) is rounded once, A and B are read as
the float32 masters that they are, and what torch would do in eight small operations a layer costs
almost nothing; it is most of a short step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pennyweight.quant import QuantizedLinear
from pennyweight.quant.kernels import cpu
from pennyweight.quant.kernels.cpu.library import Library

__all__ = ["Along", "along"]


@dataclass(frozen=True, slots=True, eq=False)
class Along:
    """A frozen layer and the one adapter of all its rows, as the kernels take them."""

    kernels: Library
    weight: cpu.Weight
    bias: Tensor | None
    beside: cpu.Beside

    def product(
        self, x: Float[Tensor, "*rows d_in"]
    ) -> tuple[Float[Tensor, "*rows d_out"], Float[Tensor, "n r"]]:
        """The layer's output, and A x, which backward reads."""
        bias = None if self.bias is None else self.bias.to(x.dtype).float()
        return cpu.adapted(self.kernels, x.contiguous(), self.weight, bias, self.beside)

    def gradients(
        self,
        grad_y: Float[Tensor, "*rows d_out"],
        x: Float[Tensor, "*rows d_in"],
        z: Float[Tensor, "n r"],
        *,
        of_x: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x, A and B: those that are asked for, or trained."""
        a, b = self.beside.a, self.beside.b
        wanted, kept = (of_x, a.requires_grad, b.requires_grad), (x.contiguous(), z.contiguous())
        rows = grad_y.contiguous()
        return cpu.adapted_back(self.kernels, rows, self.weight, self.beside, kept, wanted)


def along(layer: nn.Module, x: Tensor, beside: cpu.Beside) -> Along | None:
    """The layer with the adapter beside it, for rows like x; None where products do not take it along."""
    a, b = beside.a, beside.b
    if x.dtype != torch.bfloat16 or not x.numel() or (kernels := cpu.serving(x)) is None:
        return None
    even = not a.shape[0] % 2 and a.shape[0] <= cpu.MOST_RANK
    masters = a.dtype == b.dtype == torch.float32 and a.is_contiguous() and b.is_contiguous()
    if kernels.adapted_bf16 is None or not (even and masters):
        return None
    if isinstance(layer, QuantizedLinear):
        fits = layer.compute_dtype in (None, x.dtype)
        if fits and cpu.multiplies_bf16(kernels, x, layer.described):
            return Along(kernels, layer.stored(x.dtype), layer.bias, beside)
    elif type(layer) is nn.Linear and _plain(layer.weight):
        return Along(kernels, cpu.dense(layer.weight), layer.bias, beside)
    return None


def _plain(weight: Tensor) -> bool:
    """Whether products of bf16 read a dense weight where it lies."""
    here = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return here and not weight.requires_grad and weight.is_contiguous() and cpu.whole(weight.shape)
