"""The compiled norm, gate and rotation of a CPU, each way one pass over memory: calls into
`quant.kernels`' library.

torch's own operations take four passes for a norm, eight for its gradient and twelve for a rotation.
Numbers are rounded where torch rounds them, but for the gate and the rotation, which it rounds twice.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pennyweight.quant.kernels.cpu import TYPES
from pennyweight.quant.kernels.cpu.library import chosen

__all__ = ["FeedForward", "Norm", "Rotation", "Softmax"]

_WHOLE: Final = 16  # numbers come in whole vectors
_NUMBERS_A_THREAD: Final = 1 << 14


class _Norm(ctypes.Structure):
    """`Norm` of cpu/elementwise.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "grad", "weight", "inverse", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_bool) for name in ("known", "wide_weight")),
    )


class _Gate(ctypes.Structure):
    """`Gate` of cpu/elementwise.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "up", "grad", "out", "to_gate", "to_up")),
        ("count", ctypes.c_int64),
    )


class _Heads(ctypes.Structure):
    """`Heads` of cpu/elementwise.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("from_", "to")),
        *((name, ctypes.c_int64) for name in ("count", "from_head", "from_token")),
        *((name, ctypes.c_int64) for name in ("to_head", "to_token")),
    )


class _Rotation(ctypes.Structure):
    """`Rotation` of cpu/elementwise.h."""

    _fields_ = (
        *((name, _Heads) for name in ("query", "key")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_int64) for name in ("tokens", "width")),
        ("back", ctypes.c_bool),
    )


class _Softmax(ctypes.Structure):
    """`Softmax` of cpu/softmax.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "wanted", "sums")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        ("error", ctypes.c_bool),
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
        inverse = torch.empty(*x.shape[:-1], 1, dtype=torch.float32)
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


class Rotation:
    """What `rotation` is on a GPU."""

    @staticmethod
    def fits(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
        width = query.shape[-1]
        alike = width == key.shape[-1] == cos.shape[-1] == sin.shape[-1]
        one = query.ndim == 4 and query.shape[0] == cos.shape[0] == 1
        if not alike or not one or width % (2 * _WHOLE):
            return False
        gapless = query.stride(-1) == key.stride(-1) == 1 and cos.is_contiguous()
        return gapless and sin.is_contiguous() and _trusted(query)

    @staticmethod
    def rotate(
        query: Float[Tensor, "1 heads tokens d"],
        key: Float[Tensor, "1 kv_heads tokens d"],
        cos: Float[Tensor, "1 tokens d"],
        sin: Float[Tensor, "1 tokens d"],
        *,
        back: bool = False,
        in_place: bool = False,
    ) -> tuple[Float[Tensor, "1 heads tokens d"], Float[Tensor, "1 kv_heads tokens d"]]:
        """Both turned by their tokens' angles, or `back`; laid out token by token."""
        read = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key)]
        made = read if in_place else [_by_tokens(x) for x in read]
        heads = [
            _Heads(
                x.data_ptr(), y.data_ptr(), x.shape[1],
                x.stride(1), x.stride(2), y.stride(1), y.stride(2),
            )
            for x, y in zip(read, made, strict=True)
        ]  # fmt: skip
        angles = cos.data_ptr(), sin.data_ptr()
        _run("rotate", _Rotation(*heads, *angles, *query.shape[2:], back), query)
        return made[0], made[1]


class Softmax:
    """Of rows of logits, and their cross-entropies."""

    @staticmethod
    def fits(logits: Tensor) -> bool:
        here = logits.device.type == "cpu" and type(logits) is Tensor
        return here and logits.is_contiguous() and _trusted(logits)

    @staticmethod
    def losses(
        logits: Float[Tensor, "n vocab"], wanted: Int64[Tensor, " n"], *, error: bool
    ) -> Float[Tensor, " n"]:
        """-log p of the wanted columns; with `error` the logits are written over by their gradient,
        softmax less one at the wanted column."""
        assert wanted.is_contiguous()
        sums = torch.empty(len(logits), 3, dtype=torch.float32)
        read = logits.data_ptr(), wanted.data_ptr(), sums.data_ptr()
        _run("softmax", _Softmax(*read, *logits.shape, error), logits)
        return sums[:, 1].log() + sums[:, 0] - sums[:, 2]


def _by_tokens(x: Tensor) -> Tensor:
    one, heads, tokens, d = x.shape
    return x.new_empty(one, tokens, heads, d).transpose(1, 2)


@functools.cache
def _agrees(variant: str) -> bool:
    """Whether this variant gives the formulas' values and gradients, on a trial."""
    del variant  # what the answer is kept by
    with torch.inference_mode(False), torch.no_grad():
        return _formulas_hold()


def _formulas_hold() -> bool:
    ramp = torch.arange(6 * 48, dtype=torch.float64).view(6, 48)
    x, up, grad, weight = 5 * ramp.sin(), ramp.cos(), (3 * ramp).sin(), ramp[0].cos()
    inverse = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    n, g, s = x * inverse, grad * (1 + weight), x.sigmoid()
    head = x[:, :32].view(1, 1, 6, 32)  # turned by angles, and back by those
    one, two = head.chunk(2, -1)
    cos, sin = up[None, :, :32], grad[None, :, :32]
    s1, s2 = sin.chunk(2, -1)
    wanted, shares = torch.tensor([0, 36, 7, 31, 32, 5]), x[:, :37].softmax(-1)
    one_hot = torch.nn.functional.one_hot(wanted, 37)
    exact = (
        head * cos + torch.cat((-two, one), -1) * sin,
        head * cos + torch.cat((two * s2, -one * s1), -1),
        *(n * (1 + weight), inverse, (g - n * (g * n).mean(-1, keepdim=True)) * inverse),
        *(x * s * up, grad * up * s * (1 + x * (1 - s)), grad * x * s),
        *(-shares.log().gather(1, wanted[:, None])[:, 0], shares - one_hot),
    )
    logits = x[:, :37].float().contiguous()
    x, up, grad, weight = (each.float() for each in (x, up, grad, weight))
    turning = head.float(), head.float(), cos.float().contiguous(), sin.float().contiguous()
    found = (
        Rotation.rotate(*turning)[0],
        Rotation.rotate(*turning, back=True)[1],
        *Norm.norm(x, weight, 1e-5, wide=True),
        Norm.norm_back(grad, x, weight, inverse.float(), wide=True),
        FeedForward.gated(x, up, "silu"),
        *FeedForward.gated_back(grad, x, up, "silu", over=None),
        Softmax.losses(logits, wanted, error=True),
        logits,
    )
    return all(
        torch.allclose(one.double(), two, atol=1e-5) for one, two in zip(found, exact, strict=True)
    )


def _trusted(x: Tensor) -> bool:
    kernels = chosen()
    return kernels is not None and x.dtype in TYPES and x.numel() > 0 and _agrees(kernels.variant)


def _fits(x: Tensor) -> bool:
    return x.is_contiguous() and not x.shape[-1] % _WHOLE and _trusted(x)


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
