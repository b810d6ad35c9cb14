"""Every random state of a process as tensors: torch's on each device, Python's and numpy's own.

Nothing here draws from them (order, dropout and fresh adapters are functions of a seed and a
counter), but a person's own code around a run might.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["random_tensors", "restore_random"]


def random_tensors() -> dict[str, Tensor]:
    """`random/cpu`, `random/cuda:0` and so on: bytes; `random/python`, `random/numpy`: int64 `[627]`."""
    _, words, waiting = random.getstate()
    states = {
        "random/cpu": torch.get_rng_state(),
        "random/python": _packed(words, waiting),
    }
    generator: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    if generator["bit_generator"] == "MT19937":
        inner = generator["state"]
        waiting = generator["gauss"] if generator["has_gauss"] else None
        states["random/numpy"] = _packed([*inner["key"].tolist(), inner["pos"]], waiting)
    if torch.cuda.is_available():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"random/cuda:{number}"] = state
    if torch.backends.mps.is_available():
        states["random/mps"] = torch.mps.get_rng_state()
    return states


def restore_random(tensors: Mapping[str, Tensor]) -> None:
    """Put back what `random_tensors` gave, for the devices that are here."""
    if "random/cpu" in tensors:
        torch.set_rng_state(tensors["random/cpu"])
    if (state := tensors.get("random/numpy")) is not None:
        words, waiting = _unpacked(state)
        key = np.array(words[:-1], dtype=np.uint32)
        tail = (words[-1], int(waiting is not None), waiting or 0.0)
        np.random.set_state(("MT19937", key, *tail))  # noqa: NPY002
    for number in range(torch.cuda.device_count()):
        if (state := tensors.get(f"random/cuda:{number}")) is not None:
            torch.cuda.set_rng_state(state, number)
    if (state := tensors.get("random/mps")) is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state)
    if (state := tensors.get("random/python")) is not None:
        words, waiting = _unpacked(state)
        random.setstate((3, tuple(words), waiting))


def _packed(words: Any, waiting: float | None) -> Tensor:
    """A Mersenne Twister's 624 words and position, whether a normal draw waits, and its bits."""
    (bits,) = struct.unpack("<q", struct.pack("<d", waiting or 0.0))
    return torch.tensor([*words, int(waiting is not None), bits], dtype=torch.int64)


def _unpacked(state: Tensor) -> tuple[list[int], float | None]:
    *words, waits, bits = state.tolist()
    (waiting,) = struct.unpack("<d", struct.pack("<q", bits))
    return words, waiting if waits else None
