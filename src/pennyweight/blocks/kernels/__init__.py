"""Triton kernels of a GPU behind the elementwise work of a decoder layer: `norm`, `feed_forward` and
`rotation`, a launch each way where eager torch takes two to ten, with float32 inside.

One serves where Triton works on the device and a first trial there agrees with torch as far as
rounding allows; on a CPU the compiled library does (`compiled`); everywhere else eager torch does the
work. PENNYWEIGHT_KERNELS=off in the environment turns them off.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from pennyweight.blocks.kernels import compiled
from pennyweight.quant.kernels.cpu.library import SWITCH
from pennyweight.quant.kernels.trial import switched_off, tried

__all__ = ["KERNELS", "serving", "why_eager"]

KERNELS: Final = ("norm", "feed_forward", "rotation")
# Where kernels run; in Triton's interpreter that is a CPU.
DEVICE_TYPE = "cuda"
_COMPILED: Final[dict[str, Any]] = {
    "norm": compiled.Norm,
    "feed_forward": compiled.FeedForward,
    "rotation": compiled.Rotation,
}
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


def serving(kernel: str, *tensors: Tensor) -> Any:
    """What has this kernel's functions, if it takes such tensors where they are; None for eager torch."""
    first = tensors[0]
    if first.dtype not in _DTYPES or not all(_alike(each, first) for each in tensors):
        return None
    if first.device.type != DEVICE_TYPE:  # where the library itself knows when it must not serve
        here = _COMPILED.get(kernel) if first.device.type == "cpu" else None
        return None if here is None or not here.fits(*tensors) else here
    # A graph under construction is made of torch's own operations.
    if switched_off() or torch.compiler.is_compiling():
        return None
    module = tried(f"{__name__}.{kernel}", first.device, first.dtype)
    return None if isinstance(module, str) or not module.fits(*tensors) else module


def why_eager(kernel: str, device: torch.device) -> str:
    """Why eager torch does this kernel's work there; empty where the kernel does. Tries it."""
    if device.type != DEVICE_TYPE:
        return f"there are no kernels for {device.type}"
    if switched_off():
        return f"{SWITCH} is off"
    module = tried(f"{__name__}.{kernel}", device, torch.float32)
    return module if isinstance(module, str) else ""


def _alike(tensor: Tensor, first: Tensor) -> bool:
    """Plain, of one type and on one device: what a launch can take side by side."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.dtype == first.dtype and tensor.device == first.device
