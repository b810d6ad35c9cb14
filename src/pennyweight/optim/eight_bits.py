"""AdamW's moments in 8 bits: blocks of 256, each over its largest magnitude, in dynamic levels.

"8-bit Optimizers via Block-wise Quantization" (Dettmers et al. 2021, arXiv 2110.02861, section
2.1): the first moment in the signed dynamic format, the second, which is never negative, in the
unsigned one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from pennyweight.quant.formats import dynamic_levels

__all__ = ["BLOCK", "SMALLEST", "blocks_of", "dequantized", "quantize_into", "update"]

BLOCK = 256
# Below, moments stay in 32 bits: there is nothing to save, and small tensors (norms, biases) are
# the ones that mind.
SMALLEST = 4096


def blocks_of(count: int) -> int:
    """Blocks that so many numbers take; the last may be part full."""
    return -(-count // BLOCK)


@functools.cache
def _levels(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values, and the midpoints between neighbours."""
    with torch.inference_mode(False):
        levels = dynamic_levels(signed=signed)
        return levels.to(device), ((levels[:-1] + levels[1:]) / 2).to(device)


def dequantized(
    codes: UInt8[Tensor, " n"], peaks: Float32[Tensor, " blocks"], *, signed: bool
) -> Float32[Tensor, " n"]:
    """The numbers that codes and block peaks stand for; n is a multiple of 256."""
    levels, _ = _levels(signed, codes.device)
    values = levels.index_select(0, codes.int()).view(-1, BLOCK)
    return values.mul_(peaks[:, None]).view(-1)


def quantize_into(
    codes: UInt8[Tensor, " n"],
    peaks: Float32[Tensor, " blocks"],
    values: Float32[Tensor, " n"],
    *,
    signed: bool,
) -> None:
    """Write the nearest codes and the block peaks; `values` is used up. n is a multiple of 256."""
    _, midpoints = _levels(signed, values.device)
    rows = values.view(-1, BLOCK)
    torch.amax(rows.abs() if signed else rows, dim=1, out=peaks)
    rows.div_(peaks.clamp(min=torch.finfo(torch.float32).tiny)[:, None])
    codes.copy_(torch.bucketize(values, midpoints))


def update(
    parameters: Sequence[Tensor],
    codes: tuple[UInt8[Tensor, " n"], UInt8[Tensor, " n"]],
    peaks: tuple[Float32[Tensor, " blocks"], Float32[Tensor, " blocks"]],
    *,
    step: int,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step of parameters whose moments lie one after the other, each from a new block."""
    counts = [blocks_of(p.numel()) * BLOCK for p in parameters]
    gradient = torch.zeros_like(codes[0], dtype=torch.float32)
    for parameter, room in zip(parameters, gradient.split(counts), strict=True):
        assert parameter.grad is not None
        room[: parameter.numel()].copy_(parameter.grad.reshape(-1))
    first = dequantized(codes[0], peaks[0], signed=True)
    second = dequantized(codes[1], peaks[1], signed=False)
    first.mul_(betas[0]).add_(gradient, alpha=1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    along = second.sqrt().div_((1 - betas[1] ** step) ** 0.5).add_(eps)
    torch.div(first, along, out=along)
    for parameter, change in zip(parameters, along.split(counts), strict=True):
        parameter.mul_(1 - rate * weight_decay)
        parameter.add_(
            change[: parameter.numel()].view(parameter.shape), alpha=-rate / (1 - betas[0] ** step)
        )
    quantize_into(codes[0], peaks[0], first, signed=True)
    quantize_into(codes[1], peaks[1], second, signed=False)
