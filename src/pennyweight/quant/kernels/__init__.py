"""Device code behind the functions of this room: `cpu`, compiled C++, and a module for each kernel
of a GPU.

A kernel serves where its library works, Triton on a GPU or a build of `cpu` on a CPU, and a first
trial gives what pure torch gives, bit for bit; everywhere else pure torch does the work. In the
environment, PENNYWEIGHT_KERNELS=off forces pure torch, and avx512, avx2, neon or plain a variant of
the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from pennyweight.quant.kernels import cpu
from pennyweight.quant.kernels.cpu.library import SWITCH
from pennyweight.quant.kernels.trial import switched_off, tried

if TYPE_CHECKING:
    from pennyweight.quant.blockwise import Quantized4Bit

__all__ = ["dequantize_4bit_kernel", "dequantize_4bit_part_kernel", "why_pure_torch"]

_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_KERNEL: Final = f"{__name__}.dequantize_4bit"


def dequantize_4bit_kernel(out: Tensor) -> Callable[[Quantized4Bit, Tensor], None] | None:
    """What fills such an `out` with a dequantized weight in one launch; None for pure torch."""
    module = _serving(out)
    return None if module is None else module.fill


def dequantize_4bit_part_kernel(out: Tensor) -> Callable[..., None] | None:
    """What fills such an `out` with a part of a dequantized weight; None for pure torch."""
    module = _serving(out)
    return None if module is None else module.fill_part


def _serving(out: Tensor) -> Any:
    if out.device.type != "cuda" or out.dtype not in _DTYPES or switched_off():
        return None
    module = tried(_KERNEL, out.device, out.dtype)
    return None if isinstance(module, str) else module


def why_pure_torch(device: torch.device) -> str:
    """Why no kernel serves on this device; empty where one does. Tries it, which takes a second."""
    if device.type == "cpu":
        return cpu.why_none()
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    if switched_off():
        return f"{SWITCH} is off"
    module = tried(_KERNEL, device, torch.float32)
    return module if isinstance(module, str) else ""
