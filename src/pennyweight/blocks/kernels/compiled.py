"""The compiled norm and gate of a CPU, each way one pass over memory: calls into `quant.kernels`' library.

torch's own operations take four passes for a norm and eight for its gradient. Numbers are rounded
where torch rounds them, but for the gate, which torch rounds twice.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from pennyweight.quant.kernels.cpu import TYPES
from pennyweight.quant.kernels.cpu.library import chosen

__all__ = ["FeedForward", "Norm"]

_WHOLE: Final = 16  # numbers come in whole vectors
_NUMBERS_A_THREAD: Final = 1 << 14


class _Norm(ctypes.Structure):
    """`Norm` of cpu/elementwise.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "grad", "weight", "inverse", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_bool) for name in ("known", "wide_weight")),
    )


class _Gate(ctypes.Structure):
    """`Gate` of cpu/elementwise.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "up", "grad", "out", "to_gate", "to_up")),
        ("count", ctypes.c_int64),
    )


class Norm:
    """What `norm` is on a GPU."""

    @staticmethod
    def fits(x: Tensor, weight: Tensor) -> bool:
        return _fits(x) and weight.is_contiguous()

    @staticmethod
    def norm(
        x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"], eps: float, *, wide: bool
    ) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows 1"]]:
        """The weighed rows, and 1/rms of each in float32."""
        inverse = torch.empty(*x.shape[:-1], 1)
        return _normed(x, None, weight, inverse, eps=eps, known=False, wide_weight=wide), inverse

    @staticmethod
    def scaled(
        x: Float[Tensor, "*rows d"],
        weight: Float[Tensor, " d"],
        inverse: Float[Tensor, "*rows 1"],
        *,
        wide: bool,
    ) -> Float[Tensor, "*rows d"]:
        """The weighed rows again."""
        return _normed(x, None, weight, inverse, eps=0.0, known=True, wide_weight=wide)

    @staticmethod
    def norm_back(
        grad: Float[Tensor, "*rows d"],
        x: Float[Tensor, "*rows d"],
        weight: Float[Tensor, " d"],
        inverse: Float[Tensor, "*rows 1"],
        *,
        wide: bool,
    ) -> Float[Tensor, "*rows d"]:
        """The gradient of x."""
        rows = grad.contiguous()
        return _normed(x, rows, weight, inverse, eps=0.0, known=True, wide_weight=wide)


class FeedForward:
    """What `feed_forward` is on a GPU, for SiLU alone."""

    ACTIVATIONS: Final = ("silu",)

    @staticmethod
    def fits(gate: Tensor, up: Tensor) -> bool:
        return _fits(gate) and _fits(up) and gate.shape == up.shape

    @staticmethod
    def gated(
        gate: Float[Tensor, "*rows d"], up: Float[Tensor, "*rows d"], activation: str
    ) -> Float[Tensor, "*rows d"]:
        """silu(gate) * up."""
        assert activation in FeedForward.ACTIVATIONS
        out = torch.empty_like(gate)
        read = gate.data_ptr(), up.data_ptr()
        _run("gate", _Gate(*read, None, out.data_ptr(), None, None, gate.numel()), gate)
        return out

    @staticmethod
    def gated_back(
        grad: Float[Tensor, "*rows d"],
        gate: Float[Tensor, "*rows d"],
        up: Float[Tensor, "*rows d"],
        activation: str,
        *,
        over: Float[Tensor, "*rows d"] | None,
    ) -> tuple[Float[Tensor, "*rows d"], Float[Tensor, "*rows d"]]:
        """Gradients of gate and up; `over` is written over."""
        assert activation in FeedForward.ACTIVATIONS
        grad = grad.contiguous()
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up) if over is None else over
        read = gate.data_ptr(), up.data_ptr(), grad.data_ptr()
        written = to_gate.data_ptr(), to_up.data_ptr()
        _run("gate", _Gate(*read, None, *written, gate.numel()), gate)
        return to_gate, to_up


@functools.cache
def _agrees(variant: str) -> bool:
    """Whether this variant gives the formulas' values and gradients, on a trial."""
    del variant  # what the answer is kept by
    ramp = torch.arange(6 * 48, dtype=torch.float64).view(6, 48)
    x, up, grad, weight = 5 * ramp.sin(), ramp.cos(), (3 * ramp).sin(), ramp[0].cos()
    inverse = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    n, g, s = x * inverse, grad * (1 + weight), x.sigmoid()
    exact = (
        *(n * (1 + weight), inverse, (g - n * (g * n).mean(-1, keepdim=True)) * inverse),
        *(x * s * up, grad * up * s * (1 + x * (1 - s)), grad * x * s),
    )
    x, up, grad, weight = (each.float() for each in (x, up, grad, weight))
    found = (
        *Norm.norm(x, weight, 1e-5, wide=True),
        Norm.norm_back(grad, x, weight, inverse.float(), wide=True),
        FeedForward.gated(x, up, "silu"),
        *FeedForward.gated_back(grad, x, up, "silu", over=None),
    )
    return all(
        torch.allclose(one.double(), two, atol=1e-5) for one, two in zip(found, exact, strict=True)
    )


def _fits(x: Tensor) -> bool:
    kernels = chosen()
    if kernels is None or x.dtype not in TYPES:
        return False
    with torch.inference_mode(False), torch.no_grad():
        found = _agrees(kernels.variant)
    return found and x.is_contiguous() and x.numel() > 0 and not x.shape[-1] % _WHOLE


def _normed(
    x: Tensor, grad: Tensor | None, weight: Tensor, inverse: Tensor, **how: float
) -> Tensor:
    columns, out = x.shape[-1], torch.empty_like(x)
    wide = weight.detach().float()
    given = _Norm(
        x=x.data_ptr(),
        grad=None if grad is None else grad.data_ptr(),
        weight=wide.data_ptr(),
        inverse=inverse.data_ptr(),
        out=out.data_ptr(),
        rows=x.numel() // columns,
        columns=columns,
        **how,
    )
    _run("norm", given, x)
    return out


def _run(function: str, given: ctypes.Structure, like: Tensor) -> None:
    kernels = chosen()
    assert kernels is not None, "`fits` was asked first"
    threads = max(1, min(torch.get_num_threads(), like.numel() // _NUMBERS_A_THREAD))
    getattr(kernels, function)(ctypes.addressof(given), TYPES[like.dtype], threads)
