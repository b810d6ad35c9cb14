"""Memory that ran out, on any device, and what can be given back."""

from __future__ import annotations

import torch

from pennyweight.allocator import give_back

__all__ = ["is_out_of_memory", "release_cached"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device: torch has no single type for it on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


def release_cached(device: torch.device) -> None:
    """Give back what the device's allocator holds but nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    else:
        give_back()
