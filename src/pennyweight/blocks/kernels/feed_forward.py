"""act(gate) * up and its gradients, an element at a time in one pass (Shazeer 2020, GLU variants).

Float32 inside, rounded once; eager torch rounds act(gate) too. Backward may write over what it reads:
an element is read before it is written, and by nobody else.
"""

from __future__ import annotations

import functools
from typing import Any, Final, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

__all__ = ["ACTIVATIONS", "agrees_with_torch", "fits", "gated", "gated_back"]

_BLOCK: Final = 1024
_WARPS: Final = 4


def fits(gate: Tensor, up: Tensor) -> bool:
    """Whether such rows are taken: any, as long as there are some."""
    return gate.numel() > 0 and gate.shape == up.shape


def gated(
    gate: Float[Tensor, "*rows d"], up: Float[Tensor, "*rows d"], activation: str
) -> Float[Tensor, "*rows d"]:
    """act(gate) * up; `activation` by transformers' name."""
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gates, ups = _matrix(gate), _matrix(up)
    with torch.cuda.device_of(gate):
        _gated[_grid(gates)](
            gates, ups, out, gates.stride(0), ups.stride(0), gates.shape[1],
            ACT=activation, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return out


def gated_back(
    grad: Float[Tensor, "*rows d"],
    gate: Float[Tensor, "*rows d"],
    up: Float[Tensor, "*rows d"],
    activation: str,
    *,
    over: Float[Tensor, "*rows d"] | None,
) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows d"]]:
    """Gradients of gate and up. That of gate is written over `grad`, where that lies in one piece;
    that of up over `over`, contiguous and of no more use."""
    grad = grad.contiguous()
    grad_up = torch.empty_like(grad) if over is None else over
    assert grad_up.is_contiguous()
    gates, ups = _matrix(gate), _matrix(up)
    with torch.cuda.device_of(gate):
        _gated_back[_grid(gates)](
            grad, gates, ups, grad, grad_up, gates.stride(0), ups.stride(0), gates.shape[1],
            ACT=activation, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return grad, grad_up


def _matrix(x: Tensor) -> Tensor:
    """Rows each without gaps, apart as they are: halves of a wider layer's output are not copied."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _grid(rows: Tensor) -> tuple[int, int]:
    return len(rows), triton.cdiv(rows.shape[1], _BLOCK)


def agrees_with_torch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether values and gradients lie within a rounding of float64's there, for all activations."""
    ramp = torch.arange(3 * 1100, dtype=torch.float64, device=device).view(3, 1100)
    gate, up, grad = (each.to(dtype) for each in (5 * ramp.sin(), ramp.cos(), (3 * ramp).sin()))
    close = True
    for name, (act, slope) in _EXACT.items():
        x, beside, dy = gate.double(), up.double(), grad.double()
        exact = act(x) * beside, slope(dy * beside, x), dy * act(x)
        found = gated(gate, up, name), *gated_back(grad.clone(), gate, up, name, over=None)
        close &= all(_near(one, two) for one, two in zip(found, exact, strict=True))
    return close


def _near(found: Tensor, exact: Tensor) -> bool:
    room = max(2 * torch.finfo(found.dtype).eps, 1e-5)
    return bool((found.double() - exact).abs().max() <= room * exact.abs().max())


_aten: Final = torch.ops.aten
# The function, and its gradient from (grad, input): no autograd, whose hooks are not ours to call.
_EXACT: Final[dict[str, tuple[Any, Any]]] = {
    "silu": (_aten.silu, _aten.silu_backward),
    "gelu": (_aten.gelu, _aten.gelu_backward),
    "gelu_pytorch_tanh": (
        functools.partial(_aten.gelu, approximate="tanh"),
        functools.partial(_aten.gelu_backward, approximate="tanh"),
    ),
}
ACTIVATIONS: Final = tuple(_EXACT)


@triton.jit
@no_type_check
def _gated(gate, up, out, gate_stride, up_stride, width, ACT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = column < width
    x = tl.load(gate + row * gate_stride + column, mask=held, other=0.0).to(tl.float32)
    value, _ = _activation(x, ACT)
    value *= tl.load(up + row * up_stride + column, mask=held, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=held)


@triton.jit
@no_type_check
def _gated_back(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    gate_stride,
    up_stride,
    width,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held, out = column < width, row * width + column
    x = tl.load(gate + row * gate_stride + column, mask=held, other=0.0).to(tl.float32)
    beside = tl.load(up + row * up_stride + column, mask=held, other=0.0).to(tl.float32)
    slope = tl.load(grad + out, mask=held, other=0.0).to(tl.float32)
    value, rise = _activation(x, ACT)
    kind = grad_gate.dtype.element_ty
    tl.store(grad_gate + out, (slope * beside * rise).to(kind), mask=held)
    tl.store(grad_up + out, (slope * value).to(kind), mask=held)


@triton.jit
@no_type_check
def _activation(x, ACT: tl.constexpr):
    """act(x), and its derivative."""
    if ACT == "silu":
        share = tl.sigmoid(x)
        value = x * share
        rise = share + value * (1.0 - share)
    elif ACT == "gelu":
        share = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * share
        rise = share + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        # gelu_pytorch_tanh: 1/2 (1 + tanh(z)) is sigmoid(2 z).
        square = x * x
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * square))
        value = x * share
        rise = share + value * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * square))
    return value, rise
