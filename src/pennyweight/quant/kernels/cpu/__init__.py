"""The CPU kernels behind `blockwise`, `rowwise` and `linear`: the calls into the compiled library.

Quantizing and dequantizing give the bits of pure torch. Products are taken from values dequantized
tile by tile and rounded first to the type of the input: in float32, since on most CPUs half
precision is storage, or in bf16 with float32 sums where the processor has such products. A row's
result does not depend on the rows beside it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from pennyweight.quant.formats import (
    FourBit,
    code_order,
    dynamic_bins,
    dynamic_table,
    levels_of,
    thresholds,
)
from pennyweight.quant.kernels.cpu.library import Library, chosen, why_none

if TYPE_CHECKING:
    from pennyweight.quant.blockwise import Quantized4Bit
    from pennyweight.quant.rowwise import Quantized8Bit

__all__ = [
    "TYPES",
    "Weight",
    "agrees_with_torch",
    "dense",
    "dense_product",
    "fill",
    "multiplies_bf16",
    "nest",
    "product",
    "quantize",
    "serving",
    "stored",
    "takes_along",
    "threads_for",
    "whole",
    "why_none",
]

TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CPU: Final = torch.device("cpu")
# What is larger is not found in the caches again, so it is written past them.
_STREAMED_BYTES: Final = 1 << 24
# A thread is worth waking for so much work.
_ELEMENTS_A_THREAD: Final = 1 << 17
_PRODUCTS_A_THREAD: Final = 1 << 18
# Of a product with a dense float32 weight: torch's is as quick from there on.
_MOST_ROWS_DENSE: Final = 128
# Rows and columns of a weight whose products take adapters along come in vectors of so many.
_WHOLE: Final = 32


class Weight(ctypes.Structure):
    """`Weight` of cpu/weight.h: a value as the library reads it. The tensors must outlive it."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "group_scales")),
        *((name, ctypes.c_void_p) for name in ("offset", "dynamic", "levels")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((name, ctypes.c_int32) for name in ("block_shift", "group_shift", "group", "value_type")),
    )


def serving(tensor: Tensor) -> Library | None:
    """The kernels that take such a tensor: an ordinary one on the CPU, of a type they know."""
    if tensor.device.type != "cpu" or tensor.dtype not in TYPES or type(tensor) is not Tensor:
        return None
    return chosen()


def quantize(
    kernels: Library, flat: Tensor, codes: Tensor, absmax: Tensor, kind: FourBit, block_size: int
) -> None:
    """Fill the codes and block scales of a flat, contiguous weight."""
    assert flat.is_contiguous()
    assert codes.numel() == -(-flat.numel() // 2)
    assert absmax.numel() == -(-flat.numel() // block_size)
    kernels.quantize(
        flat.data_ptr(),
        TYPES[flat.dtype],
        flat.numel(),
        block_size,
        _thresholds(kind).data_ptr(),
        code_order(kind).data_ptr(),
        codes.data_ptr(),
        absmax.data_ptr(),
        _threads(flat.numel(), _ELEMENTS_A_THREAD),
    )


def nest(
    kernels: Library, absmax: Tensor, offset: Tensor, group: int, codes: Tensor, peaks: Tensor
) -> None:
    """Fill the codes and group scales of block scales less their mean."""
    bins = dynamic_bins(_CPU)
    kernels.nest(
        absmax.data_ptr(),
        absmax.numel(),
        offset.item(),
        group,
        bins.data_ptr(),
        bins.numel(),
        codes.data_ptr(),
        peaks.data_ptr(),
    )


def fill(kernels: Library, value: Quantized4Bit | Quantized8Bit, out: Tensor) -> None:
    """Write the dequantized weight into a contiguous `out`."""
    assert out.is_contiguous()
    weight = stored(value, out.dtype)
    streamed = out.nbytes >= _STREAMED_BYTES
    threads = _threads(out.numel(), _ELEMENTS_A_THREAD)
    kernels.dequantize(ctypes.addressof(weight), out.data_ptr(), streamed, threads)


def product(
    kernels: Library,
    x: Tensor,
    value: Quantized4Bit | Quantized8Bit,
    bias: Tensor | None,
    *,
    transposed: bool,
) -> Tensor:
    """x W^T + bias, or x W where `transposed`, in x's type."""
    weight = stored(value, x.dtype)
    rows, columns = value.shape
    inputs, outputs = (rows, columns) if transposed else (columns, rows)
    flat, shape = x.detach().reshape(-1, inputs), (*x.shape[:-1], outputs)
    added = None if bias is None else bias.detach().float().contiguous()
    assert added is None or not transposed
    at = None if added is None else added.data_ptr()
    threads = threads_for(flat.shape[0] * rows * columns)
    if multiplies_bf16(kernels, x, value):
        flat = flat.contiguous()
        y = torch.empty(shape, dtype=x.dtype)
        where = ctypes.addressof(weight), flat.data_ptr(), flat.shape[0], at
        kernels.multiply_bf16(*where, transposed, y.data_ptr(), threads)
        return y
    flat = flat.float().contiguous()
    out = torch.empty((flat.shape[0], outputs), dtype=torch.float32)
    given = ctypes.addressof(weight), flat.data_ptr(), flat.shape[0]
    if transposed:
        kernels.backward(*given, out.data_ptr(), threads)
    else:
        kernels.forward(*given, at, out.data_ptr(), threads)
    return out.to(x.dtype).view(shape)


def multiplies_bf16(kernels: Library, x: Tensor, value: Quantized4Bit | Quantized8Bit) -> bool:
    """Whether the processor's own products of bf16 take these rows and this weight."""
    from pennyweight.quant.blockwise import Quantized4Bit

    if kernels.multiply_bf16 is None or x.dtype != torch.bfloat16:
        return False
    return isinstance(value, Quantized4Bit) and not value.block_size % _WHOLE and whole(value.shape)


def takes_along(kernels: Library, x: Tensor, value: Quantized4Bit | Quantized8Bit) -> bool:
    """Whether products of these rows and this weight take adapters along."""
    if x.dtype == torch.float32:
        return whole(value.shape)
    return multiplies_bf16(kernels, x, value)


def whole(shape: Sequence[int]) -> bool:
    """Whether rows and columns of a weight come in whole vectors."""
    return not any(size % _WHOLE for size in shape)


def dense_product(
    x: Tensor, weight: Tensor, *, transposed: bool, out: Tensor | None = None
) -> Tensor | None:
    """x W^T, or x W where `transposed`, of contiguous matrices in bf16, or few rows in float32; None
    where the kernels do not take them, or take longer than torch."""
    kernels = serving(x)
    if kernels is None or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    if x.dtype == torch.bfloat16 and kernels.multiply_bf16 is None:
        return None
    if x.dtype == torch.float32 and (transposed or x.shape[0] > _MOST_ROWS_DENSE):
        return None
    fits = weight.dtype == x.dtype and weight.is_contiguous() and x.is_contiguous()
    if not fits or not x.numel() or not whole(weight.shape):
        return None
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[1 if transposed else 0])
    assert out.is_contiguous()
    read = dense(weight)  # held while it is read
    where = ctypes.addressof(read), x.data_ptr(), x.shape[0], None
    threads = threads_for(x.shape[0] * weight.numel())
    if x.dtype == torch.float32:
        kernels.forward(*where, out.data_ptr(), threads)
    else:
        kernels.multiply_bf16(*where, transposed, out.data_ptr(), threads)
    return out


def dense(weight: Tensor) -> Weight:
    """A contiguous weight as products read it, in bf16 or float32, which is theirs."""
    assert weight.dtype in (torch.bfloat16, torch.float32)
    assert weight.is_contiguous()
    return Weight(codes=weight.data_ptr(), rows=weight.shape[0], columns=weight.shape[1])


def agrees_with_torch(kernels: Library) -> bool:
    """Whether a small weight gets pure torch's codes, scales and values, its last block partial, and
    products come near torch's."""
    from pennyweight.quant.blockwise import (
        NestedScales,
        Quantized4Bit,
        fill_in_torch,
        nest_in_torch,
        quantize_in_torch,
    )

    with torch.inference_mode(False), torch.no_grad():
        ramp = torch.arange(5 * 67, dtype=torch.float32)
        weight = (ramp.sin() * ramp).view(5, 67)
        ours, theirs = ((torch.empty(168, dtype=torch.uint8), torch.empty(6)) for _ in range(2))
        quantize(kernels, weight.view(-1), *ours, "nf4", 64)
        quantize_in_torch(weight.view(-1), *theirs, "nf4", 64)
        if not all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True)):
            return False
        codes, absmax = theirs
        nested = NestedScales(torch.empty_like(codes)[:6], torch.empty(1), absmax.mean())
        nest_in_torch(absmax, nested.offset, nested.codes, nested.absmax)
        again = NestedScales(nested.codes.clone(), torch.empty(1), nested.offset)
        nest(kernels, absmax, again.offset, again.block_size, again.codes, again.absmax)
        if not torch.equal(nested.codes, again.codes) or nested.absmax != again.absmax:
            return False
        value = Quantized4Bit(codes, nested, (5, 67), torch.float32, "nf4")
        dense, expected = torch.empty(5, 67), torch.empty(5, 67)
        fill(kernels, value, dense)
        fill_in_torch(value, expected)
        if not torch.equal(dense, expected):
            return False
        x, y = weight[:3] / 400, weight[:3, :5] / 400
        products = (
            (product(kernels, x, value, None, transposed=False), x @ expected.T),
            (product(kernels, y, value, None, transposed=True), y @ expected),
        )
        return all(torch.allclose(one, other, rtol=1e-4, atol=1e-3) for one, other in products)


def stored(value: Quantized4Bit | Quantized8Bit, dtype: torch.dtype) -> Weight:
    """The value for the library; its values are rounded to this type."""
    from pennyweight.quant.rowwise import Quantized8Bit

    codes = value.codes
    rows, columns = value.shape if len(value.shape) == 2 else (1, math.prod(value.shape))
    weight = Weight(codes=codes.data_ptr(), rows=rows, columns=columns, value_type=TYPES[dtype])
    assert codes.is_contiguous()
    if isinstance(value, Quantized8Bit):
        weight.scales = _address(value.scale, torch.float32, rows)
        return weight
    absmax, block_size = value.absmax, value.block_size
    blocks = -(-rows * columns // block_size)
    assert codes.numel() == -(-rows * columns // 2), (codes.shape, value.shape)
    weight.levels = levels_of(value.format).data_ptr()
    weight.block_shift = block_size.bit_length() - 1
    if isinstance(absmax, Tensor):
        weight.scales = _address(absmax, torch.float32, blocks)
        return weight
    group = absmax.block_size
    weight.scales = _address(absmax.codes, torch.uint8, blocks)
    weight.group_scales = _address(absmax.absmax, torch.float32, -(-blocks // group))
    weight.offset = _address(absmax.offset, torch.float32, 1)
    weight.dynamic = dynamic_table(_CPU).data_ptr()
    weight.group = group
    weight.group_shift = -1 if group & (group - 1) else group.bit_length() - 1
    return weight


def _address(tensor: Tensor, dtype: torch.dtype, count: int) -> int:
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tensor.numel() == count, (tensor.shape, count)
    assert tensor.is_contiguous()
    return tensor.data_ptr()


@functools.cache
def _thresholds(kind: FourBit) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(thresholds(kind), dtype=torch.float32)


def threads_for(products: int) -> int:
    """How many threads are worth waking for so many products of two numbers."""
    return _threads(products, _PRODUCTS_A_THREAD)


def _threads(work: int, least_a_thread: int) -> int:
    return max(1, min(torch.get_num_threads(), work // least_a_thread))
