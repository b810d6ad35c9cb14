"""Products that take adapters along, on a CPU whose kernels have them: one call forward, one back.

A and B are read as the float32 masters that they are, and what torch would do in eight small operations
a layer costs little more than their arithmetic; it is much of a short step. Layers that read the same
rows, such as q, k and v, share the calls, and the gradient of these rows is one sum. In bf16 the
adapter's part is in the sums of the layer's own, y = W x + b + s B (A x), which are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pennyweight.quant import QuantizedLinear
from pennyweight.quant.kernels import cpu
from pennyweight.quant.kernels.cpu.adapted import (
    MOST_RANK,
    Beside,
    Layer,
    adapted,
    adapted_back,
)
from pennyweight.quant.kernels.cpu.library import Library

__all__ = ["Along", "Beside", "Layer", "kernels_for", "layer_along"]

# In float32 products are no quicker than torch's: what is won is the calls, few a row in longer passes.
MOST_ROWS: Final = 256


@dataclass(frozen=True, slots=True, eq=False)
class Along:
    """Frozen layers that read the same rows, each with the one adapter of all the rows, or none."""

    kernels: Library
    layers: tuple[Layer, ...]

    @property
    def masters(self) -> list[Tensor]:
        """A and B of each adapter."""
        found = [layer.beside for layer in self.layers if layer.beside is not None]
        return [factor for beside in found for factor in (beside.a, beside.b)]

    def product(
        self, x: Float[Tensor, "*rows d_in"]
    ) -> tuple[list[Float[Tensor, "*rows _"]], list[Float[Tensor, "n _"]]]:
        """What each layer gives; and A x of each adapter, which backward reads."""
        return adapted(self.kernels, x.contiguous(), self.layers)

    def narrowed(self, x: Float[Tensor, "*rows d_in"]) -> list[Float[Tensor, "n _"]]:
        """A x of each adapter alone."""
        return adapted(self.kernels, x.contiguous(), self.layers, narrow_only=True)[1]

    def gradients(
        self,
        grads: Sequence[Float[Tensor, "*rows _"]],
        x: Float[Tensor, "*rows d_in"],
        kept: Sequence[Float[Tensor, "n _"]],
        *,
        of_x: bool,
    ) -> tuple[Float[Tensor, "*rows d_in"] | None, list[Tensor | None]]:
        """Gradient of x, if it is asked for, and of the masters that are trained."""
        rows, narrow = [each.contiguous() for each in grads], [each.contiguous() for each in kept]
        return adapted_back(self.kernels, rows, self.layers, x.contiguous(), narrow, of_x=of_x)


def kernels_for(x: Tensor) -> Library | None:
    """The kernels that take adapters along for rows like x, if there are any."""
    if x.dtype not in (torch.float32, torch.bfloat16) or not x.numel():
        return None
    if x.dtype == torch.float32 and x.numel() > MOST_ROWS * x.shape[-1]:
        return None
    found = cpu.serving(x)
    if found is None or (x.dtype == torch.bfloat16 and found.adapted_bf16 is None):
        return None
    return found


def layer_along(
    kernels: Library, layer: nn.Module, x: Tensor, beside: Beside | None
) -> Layer | None:
    """The frozen layer with the adapter beside it; None where products do not take it along."""
    if beside is not None and not _fits(beside, x):
        return None
    if isinstance(layer, QuantizedLinear):
        fits = layer.compute_dtype in (None, x.dtype)
        if fits and cpu.takes_along(kernels, x, layer.described):
            return Layer(layer.stored(x.dtype), _wide(layer.bias, x), beside)
    elif type(layer) is nn.Linear and _plain(layer, x):
        return Layer(cpu.dense(layer.weight), _wide(layer.bias, x), beside)
    return None


def _fits(beside: Beside, x: Tensor) -> bool:
    a, b = beside.a, beside.b
    whole = 16 if x.dtype == torch.float32 else 2  # ranks come in vectors, or in pairs
    fits = not a.shape[0] % whole and a.shape[0] <= MOST_RANK
    return fits and all(m.dtype == torch.float32 and m.is_contiguous() for m in (a, b))


def _wide(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """A bias as products in x's type would add it."""
    return None if bias is None else bias.detach().to(x.dtype).float()


def _plain(layer: nn.Linear, x: Tensor) -> bool:
    """Whether products in x's type read a dense weight where it lies."""
    weight = layer.weight
    if weight.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
        return False
    here = weight.device.type == "cpu" and weight.dtype == x.dtype
    return here and weight.is_contiguous() and cpu.whole(weight.shape)
