"""Rotary positions (Su et al. 2021, RoFormer, section 3.2.2) of queries and keys in one launch.

In the halves' order of transformers: y1 = x1 c1 - x2 s1, y2 = x2 c2 + x1 s2. Backward turns the other
way: dx1 = g1 c1 + g2 s2, dx2 = g2 c2 - g1 s1. Float32 inside, rounded once, where eager torch rounds
each product too.
"""

from __future__ import annotations

from typing import Final, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

__all__ = ["agrees_with_torch", "fits", "rotate"]

_MOST_IN_A_TILE: Final = 4096


def fits(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether whole heads of one row of tokens are turned, each head without gaps."""
    whole = query.shape[-1] == key.shape[-1] == cos.shape[-1] and query.shape[-1] % 2 == 0
    one = query.shape[0] == cos.shape[0] == 1 and query.numel() > 0
    gapless = all(each.stride(-1) == 1 for each in (query, key, cos, sin))
    return whole and one and gapless and cos.stride() == sin.stride()


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
    # Gradients may come in any layout.
    query, key = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key))
    out = (query, key) if in_place else tuple(map(_like, (query, key)))
    half = query.shape[-1] // 2
    block = triton.next_power_of_2(half)
    heads = [min(triton.next_power_of_2(e.shape[1]), _MOST_IN_A_TILE // block) for e in out]
    strides = [each.stride(axis) for each in (query, key, *out) for axis in (1, 2)]
    with torch.cuda.device_of(query):
        _rotate[(query.shape[2],)](
            query, key, *out, cos, sin, *strides, cos.stride(1),
            QUERY_HEADS=query.shape[1], KEY_HEADS=key.shape[1],
            QUERY_TILE=max(1, heads[0]), KEY_TILE=max(1, heads[1]),
            HALF=half, BLOCK=block, BACK=back, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out[0], out[1]


def _like(x: Tensor) -> Tensor:
    one, heads, tokens, d = x.shape
    return x.new_empty(one, tokens, heads, d).transpose(1, 2)


def agrees_with_torch(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether heads are turned there, and back, within a rounding of float64's."""
    ramp = torch.arange(5 * 3 * 48, dtype=torch.float64, device=device).view(1, 5, 3, 48)
    query = ramp.sin().to(dtype).transpose(1, 2)
    key = ramp[:, :, :1].cos().to(dtype).transpose(1, 2)
    angle = ramp[:, :, 0]
    cos, sin = angle.cos().to(dtype), (2 * angle).sin().to(dtype)
    c, s = cos.double()[:, None], sin.double()[:, None]
    close = True
    for back in (False, True):
        for found, x in zip(rotate(query, key, cos, sin, back=back), (query, key), strict=True):
            x1, x2 = x.double().chunk(2, -1)
            if back:
                s1, s2 = s.chunk(2, -1)
                exact = x.double() * c + torch.cat((x2 * s2, -x1 * s1), -1)
            else:
                exact = x.double() * c + torch.cat((-x2, x1), -1) * s
            room = max(2 * torch.finfo(dtype).eps, 1e-6)
            close &= bool((found.double() - exact).abs().max() <= room * 2)
    return close


@triton.jit
@no_type_check
def _rotate(
    query,
    key,
    query_out,
    key_out,
    cos,
    sin,
    query_head,
    query_token,
    key_head,
    key_token,
    query_out_head,
    query_out_token,
    key_out_head,
    key_out_token,
    angle_token,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BACK: tl.constexpr,
):
    # One token: its angles are read once for all of its heads.
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    held = column < HALF
    at = token * angle_token + column
    c1 = tl.load(cos + at, mask=held, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + at + HALF, mask=held, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + at, mask=held, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + at + HALF, mask=held, other=0.0).to(tl.float32)[None, :]
    if BACK:
        turned = s1
        s1 = -s2
        s2 = -turned
    for first in range(0, QUERY_HEADS, QUERY_TILE):
        head = first + tl.arange(0, QUERY_TILE).to(tl.int64)
        read = query + token * query_token + head[:, None] * query_head + column[None, :]
        write = query_out + token * query_out_token + head[:, None] * query_out_head
        mask = (head < QUERY_HEADS)[:, None] & held[None, :]
        _turn(read, write + column[None, :], mask, c1, c2, s1, s2, HALF)
    for first in range(0, KEY_HEADS, KEY_TILE):
        head = first + tl.arange(0, KEY_TILE).to(tl.int64)
        read = key + token * key_token + head[:, None] * key_head + column[None, :]
        write = key_out + token * key_out_token + head[:, None] * key_out_head
        mask = (head < KEY_HEADS)[:, None] & held[None, :]
        _turn(read, write + column[None, :], mask, c1, c2, s1, s2, HALF)


@triton.jit
@no_type_check
def _turn(read, write, mask, c1, c2, s1, s2, HALF: tl.constexpr):
    x1 = tl.load(read, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(read + HALF, mask=mask, other=0.0).to(tl.float32)
    kind = write.dtype.element_ty
    tl.store(write, (x1 * c1 - x2 * s1).to(kind), mask=mask)
    tl.store(write + HALF, (x2 * c2 + x1 * s2).to(kind), mask=mask)
