"""RMSNorm's rows in one pass each way (Zhang & Sennrich 2019, section 3): x and y move once forward,
x, dy and dx once backward.

Roundings are those of `blocks.norm`: in Llama's order the normalized rows are rounded before the
weight multiplies them, in Gemma's (`wide`: 1 + weight) once, at the end. A row's sum does not depend
on the rows beside it.
"""

from __future__ import annotations

from typing import Any, Final, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float32
from torch import Tensor

__all__ = ["agrees_with_torch", "fits", "norm", "norm_back", "scaled"]

# A row is held in registers, at most 32 elements of it a thread.
_MOST_COLUMNS: Final = 16_384
_TILE: Final = 2048


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether rows of this width are taken."""
    return 0 < x.shape[-1] <= _MOST_COLUMNS and x.numel() > 0 and weight.is_contiguous()


def norm(
    x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"], eps: float, *, wide: bool
) -> tuple[Float[Tensor, "*rows d"], Float32[Tensor, "*rows 1"]]:
    """The rows over their root mean square, weighed; and 1/rms of each row."""
    inverse = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return _forward(x, weight, inverse, eps, wide=wide, given=False), inverse


def scaled(
    x: Float[Tensor, "*rows d"],
    weight: Float[Tensor, " d"],
    inverse: Float32[Tensor, "*rows 1"],
    *,
    wide: bool,
) -> Float[Tensor, "*rows d"]:
    """The same rows again, from 1/rms of each."""
    return _forward(x, weight, inverse, 0.0, wide=wide, given=True)


def _forward(
    x: Tensor, weight: Tensor, inverse: Tensor, eps: float, *, wide: bool, given: bool
) -> Tensor:
    rows, y = _matrix(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    grid, shape = _tiles(rows)
    with torch.cuda.device_of(x):
        _norm[grid](
            rows, weight, inverse, y, len(rows), rows.stride(0), eps,
            **shape, WIDE=wide, GIVEN=given, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def norm_back(
    grad_y: Float[Tensor, "*rows d"],
    x: Float[Tensor, "*rows d"],
    weight: Float[Tensor, " d"],
    inverse: Float32[Tensor, "*rows 1"],
    *,
    wide: bool,
) -> Float[Tensor, "*rows d"]:
    """dx = (g - n mean(g n)) / rms, with n = x / rms and g the weight times dy."""
    rows, grads = _matrix(x), _matrix(grad_y)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grid, shape = _tiles(rows)
    with torch.cuda.device_of(x):
        _norm_back[grid](
            grads, rows, weight, inverse, grad_x, len(rows), grads.stride(0), rows.stride(0),
            **shape, WIDE=wide,
        )  # fmt: skip
    return grad_x


def _matrix(x: Tensor) -> Tensor:
    """Rows one after the other, each without gaps; only what lies otherwise is copied."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tiles(rows: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The grid, and the constants of a tile: whole rows, several where they are short."""
    columns = rows.shape[1]
    block = triton.next_power_of_2(columns)
    several = max(1, _TILE // block)
    warps = min(16, max(4, block // 512))
    grid = (triton.cdiv(len(rows), several),)
    return grid, {"D": columns, "BLOCK": block, "ROWS": several, "num_warps": warps}


def agrees_with_torch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether rows and gradients lie within a rounding or two of float64's there, in both orders."""
    ramp = torch.arange(7 * 250, dtype=torch.float64, device=device).view(7, 250)
    x, grad, weight = (0.3 + ramp).sin().to(dtype), (ramp * ramp).cos().to(dtype), ramp[1].cos()
    weight, close = weight.to(dtype), True
    for wide in (False, True):
        y, inverse = norm(x, weight, 1e-5, wide=wide)
        grad_x = norm_back(grad, x, weight, inverse, wide=wide)
        exact = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-5)
        n, w = x.double() * exact, weight.double() + wide
        g = grad.double() * w
        slope = (g - n * (g * n).mean(-1, keepdim=True)) * exact
        close &= torch.equal(scaled(x, weight, inverse, wide=wide), y)
        close &= _near(y, n * w) and _near(grad_x, slope)
    return close


def _near(found: Tensor, exact: Tensor) -> bool:
    room = max(4 * torch.finfo(found.dtype).eps, 1e-5)
    return bool((found.double() - exact).abs().max() <= room * exact.abs().max())


# Triton compiles the source of a function, which the import hook of the tests must leave alone.
@triton.jit
@no_type_check
def _norm(
    x,
    weight,
    inverse,
    y,
    rows,
    stride,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
    GIVEN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    held = (row < rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * stride + column[None, :]
    values = tl.load(x + at, mask=held, other=0.0).to(tl.float32)
    if GIVEN:
        over = tl.load(inverse + row, mask=row < rows, other=0.0)
    else:
        over = tl.rsqrt(tl.sum(values * values, 1) / D + eps)
        tl.store(inverse + row, over, mask=row < rows)
    normalized = values * over[:, None]
    scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if WIDE:
        weighed = normalized * (1.0 + scale)
    else:
        weighed = normalized.to(y.dtype.element_ty).to(tl.float32) * scale
    out = row[:, None] * D + column[None, :]
    tl.store(y + out, weighed.to(y.dtype.element_ty), mask=held)


@triton.jit
@no_type_check
def _norm_back(
    grad_y,
    x,
    weight,
    inverse,
    grad_x,
    rows,
    grad_stride,
    stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    held = (row < rows)[:, None] & (column < D)[None, :]
    over = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
    at, grad_at = (
        row[:, None] * stride + column[None, :],
        row[:, None] * grad_stride + column[None, :],
    )
    normalized = tl.load(x + at, mask=held, other=0.0).to(tl.float32) * over
    scale = tl.load(weight + column, mask=column < D, other=0.0).to(tl.float32)[None, :]
    if WIDE:
        scale += 1.0
    g = tl.load(grad_y + grad_at, mask=held, other=0.0).to(tl.float32) * scale
    along = tl.sum(g * normalized, 1)[:, None] / D
    out = row[:, None] * D + column[None, :]
    tl.store(grad_x + out, ((g - normalized * along) * over).to(grad_x.dtype.element_ty), mask=held)
