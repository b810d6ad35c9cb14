"""The number formats of frozen weights: which real value each stored code stands for.

NF4 is from QLoRA (Dettmers et al. 2023, arXiv 2305.14314, section 3 and appendix E); the dynamic
8-bit format from "8-bit Optimizers via Block-wise Quantization" (Dettmers et al. 2021, arXiv
2110.02861, section 2), after Dettmers 2015 (arXiv 1511.04561). This is their only address here.
"""

from __future__ import annotations

import functools
from typing import Final, Literal

import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

__all__ = [
    "DYNAMIC_8BIT",
    "FP4_LEVELS",
    "NF4_LEVELS",
    "FourBit",
    "code_order",
    "dynamic_bins",
    "dynamic_levels",
    "dynamic_table",
    "levels_of",
    "pair_table",
    "rank_table",
    "thresholds",
]

FourBit = Literal["nf4", "fp4"]

NF4_LEVELS: Final = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
)
"""NormalFloat4 in code order, QLoRA appendix E: equal shares of a normal variable on either side of
an exact zero, scaled to [-1, 1]. Code order is value order."""

FP4_LEVELS: Final = (
    torch.tensor(
        [
            [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0],
            [0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0],
        ],
        dtype=torch.float32,
    ).view(-1)
    / 12.0
)
"""The 4-bit float of bitsandbytes in code order: a sign bit, then eight magnitudes over 12 (QLoRA,
section 5, compares it with NF4). Code order is not value order, and zero has two codes, 0 and 8."""


def levels_of(kind: FourBit) -> Float32[Tensor, " 16"]:
    """The 16 levels of a 4-bit format, in code order."""
    return NF4_LEVELS if kind == "nf4" else FP4_LEVELS


def dynamic_levels(*, signed: bool = True) -> Float32[Tensor, " 256"]:
    """The dynamic 8-bit format, ascending; code order is value order.

    Seven decades, 10^-6 to 1; decade i is cut into 2^i equal parts of [0.1, 1], each represented by
    its middle, with both signs; then 0 and 1. Without signs it is cut into twice as many. The edges are rounded the way a fused multiply-add
    rounds them, from below up to the middle and from above down, because that is how bitsandbytes
    gets its table on x86. Without fused instructions its own entries move by up to two units in
    the last place; readers of foreign tables allow for that.
    """
    tenth = torch.tensor(0.1, dtype=torch.float32).double()
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        parts = 2 ** (decade + (not signed))
        at = torch.arange(parts + 1, dtype=torch.float64)
        step = ((1.0 - tenth).float() / parts).double()
        rising, falling = tenth + step * at, 1.0 - step * (parts - at)
        edges = torch.where(at < (parts + 1) // 2, rising, falling).float()
        middles = (edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (decade - 6)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


DYNAMIC_8BIT: Final = dynamic_levels()
"""The 256 values of `dynamic_levels`, which stores the scales of scales."""

# bitsandbytes looks an 8-bit code up in this many equal bins of [-1, 1].
_DYNAMIC_BINS: Final = 65536

# The codes of FP4 in the order of their values. The zero of code 0 comes first: a value that rounds
# to zero from above is stored as code 8, as bitsandbytes stores it.
_FP4_ORDER: Final = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)


@functools.cache
def thresholds(kind: FourBit) -> tuple[float, ...]:
    """The 15 midpoints between neighbouring levels, ascending; a value on one takes the lower."""
    levels = levels_of(kind).sort().values
    return tuple(((levels[:-1] + levels[1:]) / 2.0).tolist())


@functools.cache
def code_order(kind: FourBit) -> UInt8[Tensor, " 16"]:
    """The codes of a format in the order of their values."""
    with torch.inference_mode(False):
        return torch.tensor(range(16) if kind == "nf4" else _FP4_ORDER, dtype=torch.uint8)


@functools.cache
def rank_table(kind: FourBit, device: torch.device) -> UInt8[Tensor, " 256"] | None:
    """For a byte of two ranks by value the byte of their codes; None where rank is code."""
    if kind == "nf4":
        return None
    order, byte = code_order(kind), torch.arange(256)
    with torch.inference_mode(False):
        return ((order[byte >> 4] << 4) | order[byte & 15]).to(device)


@functools.cache
def pair_table(kind: FourBit, device: torch.device) -> Int64[Tensor, " 256"]:
    """The two float32 levels of every byte, first code first, as the bits of one int64."""
    byte = torch.arange(256)
    with torch.inference_mode(False):
        pairs = levels_of(kind)[torch.stack([byte >> 4, byte & 15], dim=1)]
        return pairs.contiguous().view(torch.int64).view(-1).to(device)


@functools.cache
def dynamic_table(device: torch.device) -> Float32[Tensor, " 256"]:
    """DYNAMIC_8BIT on a device."""
    with torch.inference_mode(False):
        return DYNAMIC_8BIT.to(device)


@functools.cache
def dynamic_bins(device: torch.device) -> UInt8[Tensor, " bins"]:
    """The dynamic code nearest to the centre of each of 65536 equal bins of [-1, 1].

    Rounding through these bins is what bitsandbytes does on a CPU. Its GPU code searches the
    nearest code instead; the two differ only for values within half a bin, 1.5e-5 of the group's
    largest, of a midpoint.
    """
    with torch.inference_mode(False):
        centres = torch.arange(_DYNAMIC_BINS, dtype=torch.float32) / (_DYNAMIC_BINS - 1) * 2.0 - 1.0
        midpoints = (DYNAMIC_8BIT[:-1] + DYNAMIC_8BIT[1:]) / 2.0
        return torch.bucketize(centres, midpoints).to(device=device, dtype=torch.uint8)
