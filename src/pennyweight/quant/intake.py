"""What a weight must be to be quantized, and the pieces it is worked on in."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from pennyweight.errors import ModelError

__all__ = ["WEIGHT_DTYPES", "chunk_elements", "chunks", "refuse_nonfinite", "refuse_unfit"]

WEIGHT_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def chunk_elements(device: torch.device) -> int:
    """Elements worked on at once: within a CPU's caches, enough to fill a GPU.

    A quarter of it is as fast on idle cores, but starts its threads four times as often, which
    busy cores make dear.
    """
    return 1 << 20 if device.type == "cpu" else 1 << 22


def chunks(count: int, device: torch.device) -> list[tuple[int, int]]:
    """Consecutive (start, stop) that cover `count`; every start is a whole number of blocks."""
    step = chunk_elements(device)
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def refuse_unfit(weight: Tensor) -> None:
    """Raise ModelError for a dtype that is not a weight's, or an empty weight."""
    if weight.dtype not in WEIGHT_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
        raise ModelError(f"a weight to quantize is {weight.dtype}; it must be one of {names}")
    if weight.numel() == 0:
        raise ModelError(f"a weight of shape {list(weight.shape)} has nothing to quantize")


def refuse_nonfinite(weight: Tensor, absmax: Tensor) -> None:
    """Raise ModelError that counts and locates what is not finite in a weight.

    Its scales are finite exactly if it is, so only a bad weight is read again.
    """
    if absmax.isfinite().all():
        return
    bad = weight.detach().isfinite().logical_not_()
    first = bad.nonzero()[0]
    raise ModelError(
        f"a weight of shape {list(weight.shape)} holds {int(bad.sum())} values that are not "
        f"finite; the first is {weight[tuple(first)].item()} at {first.tolist()}"
    )
