"""The compiled kernel for causal attention on a CPU: the calls into `quant.kernels`' library.

It serves float32 where the library is built, and bf16 by the processor's own products or by way of
float32; torch's own kernel does the work elsewhere. Half of
its gain over torch's is that products run over whole blocks of queries in registers, half that
nothing past a block's last query is looked at.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from pennyweight.quant.kernels.cpu.library import Library, chosen

__all__ = ["attend", "attend_back", "serves"]

_WIDTHS: Final = range(16, 257, 16)
_DTYPES: Final = (torch.float32, torch.bfloat16)
_PRODUCTS_A_THREAD: Final = 1 << 18
_ROWS: Final = ("query", "key", "value", "out", "grad", "to_query", "to_key", "to_value")


class _Rows(ctypes.Structure):
    """`Rows` of cpu/attention.h."""

    _fields_ = (("at", ctypes.c_void_p), ("head", ctypes.c_int64), ("token", ctypes.c_int64))


class _Attention(ctypes.Structure):
    """`Attention` of cpu/attention.h."""

    _fields_ = (
        *((name, _Rows) for name in _ROWS),
        ("sums", ctypes.c_void_p),
        ("boundaries", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("documents", "tokens", "heads", "shared", "width")),
        ("scale", ctypes.c_float),
    )


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes such rows."""
    alike = query.shape[-1] == key.shape[-1] == value.shape[-1]
    fits = query.device.type == "cpu" and alike and query.shape[-1] in _WIDTHS
    plain = all(type(t) is Tensor and t.dtype in _DTYPES for t in (query, key, value))
    return fits and plain and (found := chosen()) is not None and _agrees(found.variant)


def attend(
    query: Float[Tensor, "1 heads tokens d"],
    key: Float[Tensor, "1 kv_heads tokens d"],
    value: Float[Tensor, "1 kv_heads tokens d"],
    boundaries: Sequence[int],
    scale: float,
) -> tuple[Float[Tensor, "1 heads tokens d"], Float[Tensor, "heads tokens"]]:
    """Each document over itself, and the log-sum-exp of every query's scores.

    An operation of torch's, so that what watches operations sees it (recomputation does).
    """
    mixed, sums = torch.ops.pennyweight.attend(query, key, value, list(boundaries), scale)
    return mixed, sums


def attend_back(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mixed: Tensor,
    sums: Tensor,
    boundaries: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each laid out as they are."""
    own = _in_bf16(query)
    given = [_by_rows(each, own) for each in (query, key, value, mixed, grad)]
    made = [torch.empty_like(each) for each in given[:3]]
    if own:  # sums over blocks of queries are kept in float32
        made[1:] = [each.float() for each in made[1:]]
    _call("attend_back", [*given, *made], sums.contiguous(), boundaries, scale)
    return made[0].to(query.dtype), made[1].to(query.dtype), made[2].to(query.dtype)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, boundaries: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    _, heads, tokens, width = query.shape
    own = _in_bf16(query)
    dtype = query.dtype if own else torch.float32
    mixed = torch.empty(1, tokens, heads, width, dtype=dtype).transpose(1, 2)
    sums = torch.empty(heads, tokens, dtype=torch.float32)
    given = [_by_rows(each, own) for each in (query, key, value)]
    _call("attend", [*given, mixed], sums, boundaries, scale)
    return mixed.to(query.dtype), sums


def _in_bf16(query: Tensor) -> bool:
    return query.dtype == torch.bfloat16 and _library().attend_bf16 is not None


def _by_rows(tensor: Tensor, own: bool) -> Tensor:
    """As the kernel reads it: rows in one piece, in bf16 if it takes that, and then in pairs."""
    tensor = tensor if own else tensor.float()
    odd = own and any(stride % 2 for stride in tensor.stride()[1:3])
    return tensor if tensor.stride(-1) == 1 and not odd else tensor.contiguous()


def _call(
    function: str, rows: Sequence[Tensor], sums: Tensor, boundaries: Sequence[int], scale: float
) -> None:
    query, key = rows[0], rows[1]
    _, heads, tokens, width = query.shape
    offsets = (ctypes.c_int64 * len(boundaries))(*boundaries)
    described = {
        name: _Rows(each.data_ptr(), each.stride(1), each.stride(2))
        for name, each in zip(_ROWS, rows, strict=False)
    }
    given = _Attention(
        **described,
        sums=sums.data_ptr(),
        boundaries=ctypes.addressof(offsets),
        documents=len(boundaries) - 1,
        tokens=tokens,
        heads=heads,
        shared=heads // key.shape[1],
        width=width,
        scale=scale,
    )
    work = sum((b - a) ** 2 for a, b in pairwise(boundaries)) * heads * width
    threads = max(1, min(torch.get_num_threads(), work // _PRODUCTS_A_THREAD))
    name = f"{function}_bf16" if query.dtype == torch.bfloat16 else function
    getattr(_library(), name)(ctypes.addressof(given), threads)


def _library() -> Library:
    found = chosen()
    assert found is not None, "`serves` was asked first"
    return found


@functools.cache
def _agrees(variant: str) -> bool:
    """Whether this variant gives what the formula gives, on a trial of two short documents."""
    del variant  # what the answer is kept by
    draw = torch.Generator().manual_seed(0)
    bounds, scale = (0, 3, 70), 0.25
    with torch.inference_mode(False), torch.enable_grad():
        query, key, value, grad = (torch.randn(1, n, 70, 16, generator=draw) for n in (4, 2, 2, 4))
        rows = [each.requires_grad_() for each in (query, key, value)]
        document = torch.bucketize(torch.arange(70), torch.tensor(bounds[1:]), right=True)
        seen = (document[:, None] == document).tril()
        scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        theirs = weights @ value.repeat_interleave(2, 1)
        slopes = torch.autograd.grad(theirs, rows, grad)
    with torch.no_grad():
        mixed, sums = _attend(query, key, value, list(bounds), scale)
        found = mixed, *attend_back(grad, query, key, value, mixed, sums, bounds, scale)
    pairs = zip(found, (theirs.detach(), *slopes), strict=True)
    return all(torch.allclose(one, two, atol=1e-5) for one, two in pairs)


_OPERATIONS = torch.library.Library("pennyweight", "FRAGMENT")
_OPERATIONS.define(
    "attend(Tensor query, Tensor key, Tensor value, int[] boundaries, float scale) -> (Tensor, Tensor)"
)
_OPERATIONS.impl("attend", _attend, "CPU")
