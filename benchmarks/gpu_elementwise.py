"""The elementwise work of a decoder layer on one GPU, ways to do it side by side: eager torch, the same
function through torch.compile, Liger's kernels where they are installed, and `blocks/kernels`.

Each way's share of the speed of a copy that moves as many bytes as the work must: every input read
once, every output written once. Rows come from `gpu_kernels`, whose table they are part of.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pennyweight.blocks import kernels

__all__ = ["Shape", "rows"]

EPS = 1e-5
_aten = torch.ops.aten
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens, and a layer of a Llama."""

    tokens: int = 4096
    hidden: int = 4096
    inside: int = 14_336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128


@dataclass(frozen=True, slots=True)
class Work:
    """One piece: bytes it must move forward and backward, and each way's two calls."""

    name: str
    forward_bytes: int
    backward_bytes: int
    ways: dict[str, tuple[Run, Run]]


def rows(
    shape: Shape, device: str, best: Callable[[Run, str], float]
) -> Iterator[tuple[str, float, str]]:
    """What was timed, seconds, and its share of a copy's speed."""
    for work in (_norm(shape, device), _gated(shape, device), _rotation(shape, device)):
        for place, moved in enumerate((work.forward_bytes, work.backward_bytes)):
            half = torch.empty(moved // 2, dtype=torch.uint8, device=device)
            copied = best(_bound(torch.empty_like(half).copy_, (half,)), device)
            direction = ("forward", "backward")[place]
            yield f"{work.name} {direction}: copy", copied, f"{moved / copied / 1e9:,.0f} GB/s"
            for way, calls in work.ways.items():
                seconds = best(calls[place], device)
                said = f"{copied / seconds:.0%} of the copy's speed"
                yield f"{work.name} {direction}: {way}", seconds, said


def _norm(shape: Shape, device: str) -> Work:
    x, grad, weight = _drawn(
        device, (shape.tokens, shape.hidden), (shape.tokens, shape.hidden), (shape.hidden,)
    )
    _, inverse = _norm_forward(x, weight)
    ways = _of_torch(
        device, (_norm_forward, (x, weight)), (_norm_backward, (grad, x, weight, inverse))
    )
    if (ours := kernels.serving("norm", x, weight)) is not None:
        ways["here"] = (
            lambda: ours.norm(x, weight, EPS, wide=False),
            lambda: ours.norm_back(grad, x, weight, inverse, wide=False),
        )
    if (liger := _liger(device)) is not None:
        ways["Liger"] = _by_autograd(lambda a: liger.liger_rms_norm(a, weight, EPS), (x,), (grad,))
    return Work("RMSNorm", 2 * x.nbytes, 3 * x.nbytes, ways)


def _norm_forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return weight * (wide * inverse).to(x.dtype), inverse


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    n, g = x.float() * inverse, grad.float() * weight.float()
    return ((g - n * (g * n).mean(-1, keepdim=True)) * inverse).to(x.dtype)


def _gated(shape: Shape, device: str) -> Work:
    gate, up, grad = _drawn(device, *[(shape.tokens, shape.inside)] * 3)
    ways = _of_torch(device, (_gated_forward, (gate, up)), (_gated_backward, (grad, gate, up)))
    if (ours := kernels.serving("feed_forward", gate, up)) is not None:
        over, slope = torch.empty_like(gate), grad.clone()
        ways["here"] = (
            lambda: ours.gated(gate, up, "silu"),
            lambda: ours.gated_back(slope, gate, up, "silu", over=over),
        )
    if (liger := _liger(device)) is not None:
        ways["Liger"] = _by_autograd(liger.liger_swiglu, (gate, up), (grad,))
    return Work("SwiGLU", 3 * gate.nbytes, 5 * gate.nbytes, ways)


def _gated_forward(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return _aten.silu_backward(grad * up, gate), grad * F.silu(gate)


def _rotation(shape: Shape, device: str) -> Work:
    wide = (shape.heads + shape.kv_heads) * shape.head_dim
    drawn = _drawn(device, *[(1, shape.tokens, wide)] * 2, *[(1, shape.tokens, shape.head_dim)] * 2)
    split = [
        each.view(1, shape.tokens, -1, shape.head_dim)
        .transpose(1, 2)
        .split((shape.heads, shape.kv_heads), dim=1)
        for each in drawn[:2]
    ]
    (query, key), (to_query, to_key) = split
    query, key, to_query, to_key = (_token_major(e) for e in (query, key, to_query, to_key))
    cos, sin = drawn[2], drawn[3]
    ways = _of_torch(
        device, (_turned, (query, key, cos, sin)), (_turned_back, (to_query, to_key, cos, sin))
    )
    if (ours := kernels.serving("rotation", query, key, cos, sin)) is not None:
        ways["here"] = (
            lambda: ours.rotate(query, key, cos, sin),
            lambda: ours.rotate(to_query, to_key, cos, sin, back=True),
        )
    if (liger := _liger(device)) is not None:
        ways["Liger"] = _by_autograd(
            lambda q, k: liger.liger_rope(q, k, cos, sin), (query, key), (to_query, to_key)
        )
    moved = 2 * (query.nbytes + key.nbytes) + cos.nbytes + sin.nbytes
    return Work("rotary positions", moved, moved, ways)


def _token_major(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    return [x * cos[:, None] + _half_turn(x) * sin[:, None] for x in (query, key)]


def _turned_back(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    return [x * cos[:, None] - _half_turn(x * sin[:, None]) for x in (query, key)]


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _of_torch(
    device: str, *calls: tuple[Callable[..., object], tuple[Tensor, ...]]
) -> dict[str, Any]:
    """Both calls eager; and compiled, on a GPU, whose compiler is the one that is asked about."""
    ways = {"eager": tuple(_bound(call, given) for call, given in calls)}
    if device == "cuda":
        compiled = [(torch.compile(call, dynamic=False), given) for call, given in calls]
        ways["torch.compile"] = tuple(_bound(call, given) for call, given in compiled)
    return ways


def _bound(call: Callable[..., object], given: tuple[Tensor, ...]) -> Run:
    return lambda: call(*given)


def _by_autograd(
    call: Callable[..., Any], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> tuple[Run, Run]:
    """Forward, and the backward alone, whose graph is kept. (Some write their gradients over what
    they kept; each then reads what the one before it wrote, in as much time.)"""
    leaves = [each.clone().requires_grad_() for each in inputs]
    out = call(*(leaf.view_as(leaf) for leaf in leaves))
    outs, slopes = (out if isinstance(out, tuple) else (out,)), [each.clone() for each in grads]
    return (
        lambda: call(*inputs),
        lambda: torch.autograd.grad(outs, leaves, slopes, retain_graph=True),
    )


def _liger(device: str) -> Any:
    """Liger's functions, where they are installed and there is a GPU for them."""
    if device != "cuda" or importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import functional

    return functional


def _drawn(device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return [torch.randn(*s, generator=generator, device=device, dtype=dtype) for s in shapes]
