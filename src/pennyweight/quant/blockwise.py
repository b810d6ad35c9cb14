"""Blockwise 4-bit storage of a frozen weight: pure functions on one frozen value.

Blocks, absmax scales and double quantization follow QLoRA (arXiv 2305.14314, section 3). Codes and
scales are those of bitsandbytes on a CPU, bit for bit, and the same on every device except for the
last bits of the mean that double quantization subtracts.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from pennyweight.errors import ModelError
from pennyweight.quant.formats import (
    FourBit,
    dynamic_bins,
    dynamic_table,
    pair_table,
    rank_table,
    thresholds,
)
from pennyweight.quant.intake import chunks, refuse_nonfinite, refuse_unfit
from pennyweight.quant.kernels import (
    cpu,
    dequantize_4bit_kernel,
    dequantize_4bit_part_kernel,
)
from pennyweight.quant.rowwise import Quantized8Bit, dequantize_8bit, quantize_8bit

__all__ = [
    "BLOCK_SIZES",
    "NESTED_BLOCK_SIZE",
    "NestedScales",
    "Quantized4Bit",
    "Quantized8Bit",
    "block_scales",
    "dequantize_4bit",
    "dequantize_4bit_part",
    "dequantize_8bit",
    "fill_in_torch",
    "nest_in_torch",
    "quantize_4bit",
    "quantize_8bit",
    "quantize_in_torch",
    "storage_bytes",
]

BLOCK_SIZES: Final = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE: Final = 256

# Smallest scale a block is divided by, so that a block of zeros gives zeros; bitsandbytes' value.
_SMALLEST_SCALE: Final = 1e-38


@dataclass(frozen=True, slots=True, eq=False)
class NestedScales:
    """Block scales, quantized once more: scale = DYNAMIC_8BIT[code] * absmax[group] + offset."""

    codes: UInt8[Tensor, " blocks"]
    absmax: Float32[Tensor, " groups"]
    offset: Float32[Tensor, ""]
    block_size: int = NESTED_BLOCK_SIZE


@dataclass(frozen=True, slots=True, eq=False)
class Quantized4Bit:
    """A weight in 4-bit blocks; element i is level[code i] * scale[i // block_size], row-major.

    Two codes a byte, the first in the high half; an odd count leaves the last low half unused.
    `absmax` holds the block scales, plain or quantized once more. `shape` and `dtype` are those
    of the weight it came from.
    """

    codes: UInt8[Tensor, " packed"]
    absmax: Float32[Tensor, " blocks"] | NestedScales
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: FourBit
    block_size: int = 64

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales held in memory."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, to move, hash or register; `with_tensors` is the inverse."""
        nested = self.absmax
        if not isinstance(nested, NestedScales):
            return {"codes": self.codes, "absmax": nested}
        return {
            "codes": self.codes,
            "absmax": nested.codes,
            "nested_absmax": nested.absmax,
            "nested_offset": nested.offset,
        }

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Quantized4Bit:
        """The same weight on other tensors, moved ones for instance; not copied."""
        scales: Tensor | NestedScales = tensors["absmax"]
        if isinstance(self.absmax, NestedScales):
            scales = replace(
                self.absmax,
                codes=tensors["absmax"],
                absmax=tensors["nested_absmax"],
                offset=tensors["nested_offset"],
            )
        return replace(self, codes=tensors["codes"], absmax=scales)

    def to_bitsandbytes(self, prefix_name: str = "") -> dict[str, Tensor]:
        """The tensors of a bitsandbytes checkpoint; see `bitsandbytes_layout.to_bitsandbytes`."""
        from pennyweight.quant.bitsandbytes_layout import to_bitsandbytes

        return to_bitsandbytes(self, prefix_name)


def quantize_4bit(
    weight: Float[Tensor, "*shape"],
    *,
    format: FourBit = "nf4",  # noqa: A002
    block_size: int = 64,
    double_quantization: bool = True,
) -> Quantized4Bit:
    """Store a weight of any shape in 4-bit blocks, cut from its row-major order.

    Raises ModelError if the weight is empty, not float32, bfloat16 or float16, or holds a NaN or
    an infinity. Temporary memory is a few chunks, not a multiple of the weight.
    """
    refuse_unfit(weight)
    if block_size not in BLOCK_SIZES:
        raise ModelError(f"block size {block_size} is not one of {BLOCK_SIZES}")
    flat = weight.detach().reshape(-1)
    count = flat.numel()
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-count // block_size), dtype=torch.float32, device=flat.device)
    if (kernels := cpu.serving(flat)) is not None:
        cpu.quantize(kernels, flat, codes, absmax, format, block_size)
    else:
        quantize_in_torch(flat, codes, absmax, format, block_size)
    refuse_nonfinite(weight, absmax)
    return Quantized4Bit(
        codes=codes,
        absmax=_nested(absmax) if double_quantization else absmax,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        format=format,
        block_size=block_size,
    )


def quantize_in_torch(
    flat: Float[Tensor, " count"],
    codes: UInt8[Tensor, " packed"],
    absmax: Float32[Tensor, " blocks"],
    kind: FourBit,
    block_size: int,
) -> None:
    """Fill the codes and block scales of a weight; the reference of its kernel.

    What is not finite in a block is so in its scale.
    """
    count = flat.numel()
    whole = count - count % block_size
    for start, stop in chunks(whole, flat.device):
        blocks = flat[start:stop].view(-1, block_size).float()
        peaks = absmax[start // block_size : stop // block_size]
        torch.amax(blocks.abs(), dim=1, out=peaks)
        # Multiplying by the reciprocal and dividing round differently; bitsandbytes multiplies
        # whole blocks and divides the last partial one.
        scaled = blocks * (1.0 / peaks.clamp(min=_SMALLEST_SCALE)).unsqueeze(1)
        codes[start // 2 : stop // 2] = _packed_codes(scaled.view(-1), kind)
    if whole < count:
        tail = flat[whole:].float()
        absmax[-1] = tail.abs().amax().clamp(min=_SMALLEST_SCALE)
        codes[whole // 2 :] = _packed_codes(tail / absmax[-1], kind)


def dequantize_4bit(
    q: Quantized4Bit, dtype: torch.dtype | None = None, out: Float[Tensor, "*shape"] | None = None
) -> Float[Tensor, "*shape"]:
    """The weight in its own shape: float32 level times float32 scale, rounded once to `dtype`.

    `dtype` defaults to the original one. `out` (contiguous, of that shape) is filled and returned
    if given, and its dtype counts. A kernel does it where one serves; see `kernels`.
    """
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.codes.device)
    assert tuple(out.shape) == q.shape, (out.shape, q.shape)
    assert out.is_contiguous()
    assert dtype in (None, out.dtype), (dtype, out.dtype)
    if (kernels := cpu.serving(out)) is not None:
        cpu.fill(kernels, q, out)
    else:
        fill = dequantize_4bit_kernel(out) or fill_in_torch
        fill(q, out)
    return out


def dequantize_4bit_part(
    q: Quantized4Bit, out: Float[Tensor, "rows columns"], *, row: int = 0, column: int = 0
) -> None:
    """Write the rectangle of a dequantized `[d_out, d_in]` weight that begins at `row`, `column` into
    `out`, whose rows may be part of wider ones.

    `column`, the columns of `out` and `d_in` are multiples of the block size. Where no kernel serves
    the whole weight is dequantized on the way.
    """
    rows, columns = out.shape
    d_out, d_in = q.shape
    assert all(n % q.block_size == 0 for n in (d_in, column, columns)), (d_in, column, columns)
    assert row + rows <= d_out
    assert column + columns <= d_in
    if (fill := dequantize_4bit_part_kernel(out)) is not None:
        fill(q, out, row=row, column=column)
    else:
        whole = dequantize_4bit(q, out.dtype)
        out.copy_(whole[row : row + rows, column : column + columns])


def fill_in_torch(q: Quantized4Bit, out: Float[Tensor, "*shape"]) -> None:
    """Write the dequantized weight into a contiguous `out`; the reference of its kernel."""
    flat, scales, table = out.view(-1), block_scales(q), pair_table(q.format, q.codes.device)
    for start, stop in chunks(flat.numel(), out.device):
        # One gather of 8 bytes fetches the two levels of a byte.
        index = q.codes[start // 2 : -(-stop // 2)].int()
        levels = table.index_select(0, index).view(torch.float32)[: stop - start]
        blocks = scales[start // q.block_size : -(-stop // q.block_size)]
        # A product written to another dtype is first made in full beside it; in place it is not.
        direct = out.dtype == torch.float32
        product = flat[start:stop] if direct else levels
        _multiply_blocks(levels, blocks, q.block_size, out=product)
        if not direct:
            flat[start:stop] = product


def block_scales(q: Quantized4Bit) -> Float32[Tensor, " blocks"]:
    """One float32 scale a block; nested scales are multiplied out, then the offset is added."""
    nested = q.absmax
    if not isinstance(nested, NestedScales):
        return nested
    values = dynamic_table(nested.codes.device).index_select(0, nested.codes.int())
    _multiply_blocks(values, nested.absmax, nested.block_size, out=values)
    return values.add_(nested.offset)


def storage_bytes(
    shape: tuple[int, ...],
    format: FourBit | Literal["int8"] = "nf4",  # noqa: A002
    double_quantization: bool = True,
    *,
    block_size: int = 64,
) -> int:
    """Bytes a quantized weight of this shape holds, scales included: `stored_bytes` beforehand.

    4 + 8/64 + 32/(64 * 256) bits an element, and 4 bytes of offset, with nested NF4 scales.
    """
    count = functools.reduce(int.__mul__, shape, 1)
    if format == "int8":
        return count + 4 * shape[0]
    blocks = -(-count // block_size)
    packed = -(-count // 2)
    if not double_quantization:
        return packed + 4 * blocks
    return packed + blocks + 4 * -(-blocks // NESTED_BLOCK_SIZE) + 4


def _nested(absmax: Float32[Tensor, " blocks"]) -> NestedScales:
    """Block scales less their mean, in 8-bit groups of 256."""
    offset = absmax.mean()
    if not offset.isfinite():
        raise ModelError(
            f"block scales up to {absmax.max().item():.3g} overflow when averaged for double "
            "quantization; store this weight without it"
        )
    groups = -(-len(absmax) // NESTED_BLOCK_SIZE)
    codes = torch.empty(len(absmax), dtype=torch.uint8, device=absmax.device)
    peaks = torch.empty(groups, dtype=torch.float32, device=absmax.device)
    if (kernels := cpu.serving(absmax)) is not None:
        cpu.nest(kernels, absmax, offset, NESTED_BLOCK_SIZE, codes, peaks)
    else:
        nest_in_torch(absmax, offset, codes, peaks)
    return NestedScales(codes=codes, absmax=peaks, offset=offset)


def nest_in_torch(
    absmax: Float32[Tensor, " blocks"],
    offset: Float32[Tensor, ""],
    codes: UInt8[Tensor, " blocks"],
    peaks: Float32[Tensor, " groups"],
) -> None:
    """Fill the codes and group scales of block scales; the reference of its kernel."""
    padded = torch.zeros(len(peaks) * NESTED_BLOCK_SIZE, device=absmax.device)
    padded[: len(absmax)] = absmax - offset
    grouped = padded.view(-1, NESTED_BLOCK_SIZE)
    torch.amax(grouped.abs(), dim=1, out=peaks)
    scaled = (grouped * (1.0 / peaks).unsqueeze(1)).clamp_(-1.0, 1.0)
    bins = dynamic_bins(absmax.device)
    # 0 * inf in a group of zeros or of subnormal numbers; such a value takes the lowest bin.
    position = ((scaled + 1.0) * 0.5 * (len(bins) - 1) + 0.5).nan_to_num_(nan=0.0)
    codes.copy_(bins.index_select(0, position.int().view(-1))[: len(codes)])


def _packed_codes(scaled: Tensor, kind: FourBit) -> Tensor:
    """The nearest level of each value, a tie to the lower one, two a byte."""
    if scaled.numel() % 2:
        scaled = torch.nn.functional.pad(scaled, (0, 1))
    rank = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
    above = torch.empty(scaled.shape, dtype=torch.bool, device=scaled.device)
    for threshold in thresholds(kind):
        rank.add_(torch.gt(scaled, threshold, out=above))
    packed = (rank[::2] << 4).bitwise_or_(rank[1::2])
    table = rank_table(kind, packed.device)
    return packed if table is None else table.index_select(0, packed.int())


def _multiply_blocks(values: Tensor, scales: Tensor, block_size: int, *, out: Tensor) -> None:
    """out[i] = values[i] * scales[i // block_size], the last block possibly partial."""
    count = values.numel()
    whole = count - count % block_size
    torch.mul(
        values[:whole].view(-1, block_size),
        scales[: whole // block_size].unsqueeze(1),
        out=out[:whole].view(-1, block_size),
    )
    if whole < count:
        torch.mul(values[whole:], scales[-1], out=out[whole:])
