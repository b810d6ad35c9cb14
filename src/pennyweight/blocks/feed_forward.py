"""The gated feed-forward of Llama and its kin: down(act(gate x) * up x) (Shazeer 2020, SwiGLU).

Plain autograd keeps gate, act(gate), up and their product. Here backward keeps gate and up alone
and forms the rest again: elementwise work, where a product would cost. A kernel does it in
one launch each way on a GPU, and in one pass on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pennyweight.blocks.kernels import serving
from pennyweight.lora.abreast import abreast, along_of
from pennyweight.lora.along import Along
from pennyweight.lora.formed import kept
from pennyweight.lora.layer import LoraLinear, Update, input_gradient, linear_shape
from pennyweight.quant import QuantizedLinear
from pennyweight.route import Route

__all__ = ["ACTIVATIONS", "GatedFeedForward"]

_aten = torch.ops.aten

# By transformers' name: the function, and its gradient from (grad, input).
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (F.silu, _aten.silu_backward),
    "gelu": (F.gelu, _aten.gelu_backward),
    "gelu_pytorch_tanh": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    ),
}


class GatedFeedForward(nn.Module):
    """down(act(gate x) * up x), its layers under the names their model gave them.

    `merged`: gate and up are one layer, `gate_up_proj` (Phi-3). `kept_after`: something after it
    keeps its output for backward, a norm say; then a recomputation cannot leave out the product
    with `down_proj`.
    """

    down_proj: nn.Module
    pennyweight_route: Route

    def __init__(
        self, layers: dict[str, nn.Module], activation: str, *, kept_after: bool = False
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.activation, self.kept_after = activation, kept_after
        self.merged = "gate_up_proj" in layers

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        if (whole := self._along(x)) is not None:
            first, second = whole
            return cast(
                Tensor, _Along.apply(x, self, first, second, *first.masters, *second.masters)
            )
        if self.merged:
            gate, up = cast(nn.Module, self.gate_up_proj)(x).chunk(2, dim=-1)
        else:
            gate, up = abreast(self._readers, x)
        down = self.down_proj
        if not (torch.is_grad_enabled() and gate.requires_grad and _is_frozen(down, gate)):
            return cast(Tensor, down(self.gated(gate, up)))
        updates = down.updates(gate) if isinstance(down, LoraLinear) else ()
        masters = [factor for update in updates for factor in (update.a, update.b)]
        return cast(Tensor, _GatedDown.apply(gate, up, self, updates, *masters))

    @property
    def _readers(self) -> list[nn.Module]:
        return [cast(nn.Module, self.gate_proj), cast(nn.Module, self.up_proj)]

    def _along(self, x: Tensor) -> tuple[Along, Along] | None:
        """Gate and up, and down, where products of bf16 take all of them along with their adapters."""
        if self.merged or (first := along_of(self._readers, x)) is None:
            return None
        if not (x.requires_grad or any(master.requires_grad for master in first.masters)):
            return None
        second = along_of([self.down_proj], x)
        return None if second is None else (first, second)

    def gated(
        self, gate: Float[Tensor, "*rows inside"], up: Float[Tensor, "*rows inside"]
    ) -> Float[Tensor, "*rows inside"]:
        """act(gate) * up."""
        tracked = torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)
        if not tracked and (kernel := self.kernel(gate, up)) is not None:
            x: Tensor = kernel.gated(gate, up, self.activation)
            return x
        act, _ = ACTIVATIONS[self.activation]
        return act(gate) * up if tracked else act(gate).mul_(up)

    def gated_back(
        self,
        grad: Float[Tensor, "*rows inside"],
        gate: Float[Tensor, "*rows inside"],
        up: Float[Tensor, "*rows inside"],
        *,
        over: Float[Tensor, "*rows inside"],
    ) -> tuple[Float[Tensor, "*rows inside"], Float[Tensor, "*rows inside"]]:
        """Gradients of gate and up; `grad` and `over` are written over."""
        if (kernel := self.kernel(gate, up)) is not None:
            pair: tuple[Tensor, Tensor] = kernel.gated_back(
                grad, gate, up, self.activation, over=over
            )
            return pair
        act, slope = ACTIVATIONS[self.activation]
        of_up = act(gate).mul_(grad)
        return slope(grad.mul_(up), gate), of_up

    def kernel(self, gate: Tensor, up: Tensor) -> Any:
        """What does the elementwise work of such rows; None for eager torch."""
        found = serving("feed_forward", gate, up)
        return None if found is None or self.activation not in found.ACTIVATIONS else found

    @property
    def left_out(self) -> bool:
        """Whether a layer that is computed again for backward has no use for the output."""
        return self.pennyweight_route.recomputing and not self.kept_after


class _GatedDown(torch.autograd.Function):
    """act(gate) * up through the last layer; gate, up and the adapters' A x are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        block: GatedFeedForward,
        updates: tuple[Update, ...],
        *masters: Tensor,
    ) -> Tensor:
        x, down, kept = block.gated(gate, up), block.down_proj, list[Tensor]()
        if block.left_out:
            if isinstance(down, LoraLinear):
                kept = down.narrowed(x, updates)
            width, _ = linear_shape(down)
            y = x.new_zeros(()).expand(*x.shape[:-1], width)
        elif isinstance(down, LoraLinear):
            y, kept = down.product(x, updates)
        else:
            y = down(x)
        ctx.block, ctx.updates = block, updates
        ctx.save_for_backward(gate, up, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *kept = ctx.saved_tensors
        block: GatedFeedForward = ctx.block
        down, kernel = block.down_proj, block.kernel(gate, up)
        acted, x, of_factors = None, None, list[Tensor | None]()
        if kernel is None:
            acted = ACTIVATIONS[block.activation][0](gate)
        if isinstance(down, LoraLinear):
            x = block.gated(gate, up) if acted is None else acted * up
            grad_x, of_factors = down.gradients(grad_y, x, kept, ctx.updates, of_x=True)
        else:
            grad_x = input_gradient(down, grad_y)
        assert grad_x is not None
        if acted is None:
            grads = kernel.gated_back(grad_x, gate, up, block.activation, over=x)
            return *grads, None, None, *of_factors
        del x  # as large as each of the gradients made now
        grad_up = acted.mul_(grad_x)
        slope = ACTIVATIONS[block.activation][1]
        return slope(grad_x.mul_(up), gate), grad_up, None, None, *of_factors


class _Along(torch.autograd.Function):
    """All of it by two calls for its three layers; kept are its input, gate, up and each A x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: GatedFeedForward, first: Along, second: Along, *masters: Tensor
    ) -> Tensor:
        (gate, up), narrow = first.product(x)
        inside = block.gated(gate, up)
        if block.left_out:
            narrow += second.narrowed(inside)
            y = x.new_zeros(()).expand(*x.shape[:-1], linear_shape(block.down_proj)[0])
        else:
            (y,), of_down = second.product(inside)
            narrow += of_down
        parts, ctx.kept = kept(x)
        ctx.block, ctx.first, ctx.second = block, first, second
        ctx.save_for_backward(*parts, gate, up, *narrow)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, (gate, up, *narrow) = ctx.kept.again(ctx.saved_tensors)
        block: GatedFeedForward = ctx.block
        of_down = len(ctx.second.masters) // 2
        split = len(narrow) - of_down
        inside = block.gated(gate, up)
        of_inside, of_second = ctx.second.gradients((grad_y,), inside, narrow[split:], of_x=True)
        grads = block.gated_back(of_inside, gate, up, over=inside)
        of_x, of_first = ctx.first.gradients(grads, x, narrow[:split], of_x=ctx.needs_input_grad[0])
        return of_x, None, None, None, *of_first, *of_second


def _is_frozen(layer: nn.Module, x: Tensor) -> bool:
    """Whether the layer's weight gets no gradient and its product runs in x's type."""
    base = layer.base_layer if isinstance(layer, LoraLinear) else layer
    if torch.is_autocast_enabled(x.device.type):
        return False
    return isinstance(base, QuantizedLinear) or (
        isinstance(base, nn.Linear) and not base.weight.requires_grad
    )
