"""The learning rate of each step: warm-up, then constant, linear or cosine."""

from __future__ import annotations

import math
from typing import Literal

import torch

__all__ = ["lr_at", "set_learning_rate"]


def lr_at(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    kind: Literal["constant", "linear", "cosine"] = "constant",
    min_ratio: float = 0.0,
) -> float:
    """Learning rate of the optimizer step taken after `step` others.

    Warm-up rises in equal parts and meets the peak at its last step; from there linear and cosine
    fall towards `min_ratio * peak`, which they would meet at `total_steps`. Of 4 steps with 2 of
    warm-up, linear: 1/2, 1, 1, 1/2 of the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if kind == "constant":
        return peak
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    left = 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return peak * (min_ratio + (1.0 - min_ratio) * left)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group `rate` times its own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]
