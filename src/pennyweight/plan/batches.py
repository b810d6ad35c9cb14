"""One micro-batch at a time: which of a run's own takes the most memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pennyweight.config import RunConfig
from pennyweight.plan.devices import Device
from pennyweight.plan.memory import peak_bytes
from pennyweight.plan.outline import shapes_of
from pennyweight.plan.setting import DataSize, Recompute, Setting

__all__ = ["batch_peaks"]


def batch_peaks(
    config: RunConfig, batches: Sequence[DataSize], *, device: Device, policy: Recompute
) -> list[int]:
    """Predicted peak, in bytes, of a pass over each of these micro-batches."""
    setting = Setting(config, shapes_of(config.base.model), device)
    return [peak_bytes(replace(setting, rows=size), policy) for size in batches]
