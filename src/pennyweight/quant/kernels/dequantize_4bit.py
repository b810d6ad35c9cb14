"""4-bit blocks to dense values in one launch, by a Triton kernel.

For each element, level[code] * scale in float32, rounded once; the scale of a nested block is
dynamic[code] * group scale + offset, the product rounded before the sum, as in `blockwise`. That is
why fused multiply-add is off. Traffic is the codes, their scales and the output, each once.

`fill_part` writes a rectangle of the weight into a buffer of its own: whole rows for the forward
product, columns for the input gradient (so that no partial sums are rounded), as many at a time as
stay in the second-level cache between the launch and the product that reads them.
"""

from __future__ import annotations

import functools
from typing import Final, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

from pennyweight.quant.blockwise import NestedScales, Quantized4Bit, fill_in_torch, quantize_4bit
from pennyweight.quant.formats import FourBit, dynamic_table, levels_of

__all__ = ["agrees_with_torch", "fill", "fill_part"]

_WARPS: Final = 8
# One store of 16 bytes a thread, so that values leave in the layout in which they are made.
_TILE_BYTES: Final = _WARPS * 32 * 16


def fill(q: Quantized4Bit, out: Float[Tensor, "*shape"]) -> None:
    """Write the dequantized weight into `out`, contiguous, on the device of the weight."""
    assert out.is_contiguous()
    _launch(q, out, out.numel(), q.codes.numel(), across=0, total=0, first=0, stride=0)


def fill_part(
    q: Quantized4Bit, out: Float[Tensor, "rows columns"], *, row: int = 0, column: int = 0
) -> None:
    """Write the rectangle of a `[d_out, d_in]` weight that begins at `row`, `column` into `out`.

    `out` may be part of a wider buffer: its columns lie side by side, its rows need not. `column`,
    the columns of `out` and `d_in` are multiples of the block size.
    """
    d_out, d_in = q.shape
    rows, columns = out.shape
    assert out.stride(1) == 1
    assert all(n % q.block_size == 0 for n in (d_in, column, columns)), (d_in, column, columns)
    assert row + rows <= d_out
    assert column + columns <= d_in
    _launch(
        q,
        out,
        out.numel(),
        out.numel() // 2,
        across=columns // q.block_size,
        total=d_in // q.block_size,
        first=(row * d_in + column) // q.block_size,
        stride=out.stride(0),
    )


def _launch(
    q: Quantized4Bit,
    out: Tensor,
    count: int,
    packed: int,
    *,
    across: int,
    total: int,
    first: int,
    stride: int,
) -> None:
    nested = q.absmax if isinstance(q.absmax, NestedScales) else None
    scales = q.absmax if nested is None else nested.codes
    assert isinstance(scales, Tensor)
    assert q.codes.is_contiguous()
    assert scales.is_contiguous()
    rows = max(1, _TILE_BYTES // (out.element_size() * q.block_size))
    # Kernels are launched on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(out):
        _dequantize[(triton.cdiv(count, rows * q.block_size),)](
            q.codes,
            _levels(q.format, out.device),
            scales,
            None if nested is None else dynamic_table(out.device),
            None if nested is None else nested.absmax,
            None if nested is None else nested.offset,
            out,
            count,
            packed,
            across,
            total,
            first,
            stride,
            BLOCK=q.block_size,
            ROWS=rows,
            GROUP=0 if nested is None else nested.block_size,
            PART=across > 0,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )


def agrees_with_torch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a small weight comes out as in pure torch there: some tiles, the last one partial."""
    count = 3 * _TILE_BYTES + 37
    ramp = torch.arange(count, dtype=torch.float32, device=device)
    q = quantize_4bit(ramp.sin() * (ramp / count))
    ours, reference = (torch.empty(count, dtype=dtype, device=device) for _ in range(2))
    fill(q, ours)
    fill_in_torch(q, reference)
    return torch.equal(ours, reference)


@functools.cache
def _levels(kind: FourBit, device: torch.device) -> Float32[Tensor, " 16"]:
    with torch.inference_mode(False):
        return levels_of(kind).to(device)


# Triton compiles the source of a function, which the import hook of the tests must leave alone.
@triton.jit
@no_type_check
def _dequantize(
    codes,
    levels,
    scales,
    dynamic,
    group_scales,
    offset,
    out,
    count,
    packed,
    across,
    total,
    offset_blocks,
    stride,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
):
    # One tile: ROWS blocks from block `first` on, of which the last tile may lack some. Where it
    # begins takes 64 bits, for weights of 2^31 elements and more; within it 32 are enough.
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    held = row * BLOCK < count - first * BLOCK
    within, half = tl.arange(0, BLOCK)[None, :], tl.arange(0, BLOCK // 2)[None, :]
    byte, index = row[:, None] * (BLOCK // 2) + half, row[:, None] * BLOCK + within
    start = first * (BLOCK // 2)
    if PART:
        # Block i stands in row i // across of the part; rows of the weight are `total` blocks long.
        number = first + row
        block = offset_blocks + (number // across) * total + number % across
        begins = (number // across) * stride + (number % across) * BLOCK
        scale_at = scales + block
        code_at, out_at = (
            codes + block[:, None] * (BLOCK // 2) + half,
            out + begins[:, None] + within,
        )
    else:
        scale_at = scales + first + row
        code_at, out_at = codes + start + byte, out + first * BLOCK + index
    scale = tl.load(scale_at, mask=held)
    if GROUP:
        group = (block if PART else first + row) // GROUP
        scale = tl.load(dynamic + scale.to(tl.int32)) * tl.load(group_scales + group, mask=held)
        scale += tl.load(offset)

    # The masks compare with `packed` and `count` apart, not with twice or half of one of them: so
    # the compiler sees that 16 neighbours are all in or all out, and moves them at once.
    pair = tl.load(code_at, mask=byte < packed - start).to(tl.int32)
    high = tl.load(levels + (pair >> 4)) * scale[:, None]
    low = tl.load(levels + (pair & 15)) * scale[:, None]

    value = tl.interleave(high, low).to(out.dtype.element_ty)
    tl.store(out_at, value, mask=index < count - first * BLOCK)
