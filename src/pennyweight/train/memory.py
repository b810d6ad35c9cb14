"""What training keeps in memory, measured."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pennyweight.data.batch import parts
from pennyweight.model import is_out_of_memory, release_cached

__all__ = [
    "is_out_of_memory",
    "parts",
    "peak_memory_bytes",
    "release_cached",
    "restart_peak",
    "saved_bytes",
]


def restart_peak(device: torch.device) -> None:
    """Let the high-water mark of a CPU run begin now, where the system offers it (Linux).

    While a base loads, its mapped files count as resident, though the kernel takes those pages
    back whenever it needs them. On CUDA everything that loading allocates is counted anyway.
    """
    if device.type == "cpu":
        gc.collect()  # the loader's own rings hold the mapped files
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes(device: torch.device) -> int | None:
    """High-water mark so far: of the device's allocations on CUDA, else of the process's resident
    memory; None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's mark survives exec, so it may be a parent's
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if Path("/System/Library").is_dir() else peak * 1024


def saved_bytes(run: Callable[[], Any], *, besides: Iterable[Tensor] = ()) -> int:
    """Bytes autograd keeps for backward while `run` computes, each storage once.

    Storages of `besides` (weights, that live anyway) are not counted.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    kept: dict[int, int] = {}
    alive: list[Sequence[Tensor] | Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(run())
    return sum(kept.values())
