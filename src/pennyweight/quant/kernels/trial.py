"""A kernel of a GPU is tried before it serves: once a process for each device and type, against pure
torch. Whatever keeps it from working is told once, and pure torch does its work.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import Any

import torch

from pennyweight.quant.kernels.cpu.library import SWITCH

__all__ = ["switched_off", "tried"]


def switched_off() -> bool:
    return os.environ.get(SWITCH, "").strip().lower() == "off"


@functools.cache
def tried(module: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The module of a kernel, after its `agrees_with_torch`; or, in words, why it cannot serve."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    try:
        if found.agrees_with_torch(device, dtype):
            return found
        why = "it gives other values than pure torch"
    # Whatever keeps a compiler from working on a machine we do not know: no C compiler, no Python
    # headers, a GPU it no longer serves. Each is an exception of another package.
    except Exception as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
    name = module.rpartition(".")[2]
    warnings.warn(
        f"the kernel `{name}` does not work on {device} ({why}); pure torch does its work, with "
        f"the same result and more slowly. {SWITCH}=off silences this",
        stacklevel=2,
    )
    return f"the kernel `{name}` does not work on {device}: {why}"
