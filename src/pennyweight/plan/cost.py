"""Steps, tokens, floating-point operations, seconds and disk of a run.

A token costs, with N linear parameters, h = d * vocabulary, P adapter parameters, L layers and
documents of s tokens: forward 2N + 2h + 2dsL + 2P; gradients of inputs 2N + 2h, of attention
5dsL, of the adapter 4P; recomputing adds 2N + 2dsL + 2P, less what is left out. Full fine-tuning adds 2N + 2h for the
weights' own gradients (arithmetic from the shapes; a product of m x k x n counts 2mkn).
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pennyweight.plan.activations import kept_bytes
from pennyweight.plan.devices import Device
from pennyweight.plan.outline import hub_cache, is_here
from pennyweight.plan.setting import Recompute, Setting

__all__ = ["Cost", "Disk", "cost", "disk", "flops_a_token", "paced"]

# Share of the stated throughput that products of training shapes reach.
_SHARE = {"cuda": 0.55, "cpu": 0.6, "mps": 0.4}
# Passes over the kept activations by everything between the products, forward and backward.
_SWEEPS = 6
# Parameters a second that a processor dequantizes; a card does it at memory speed.
_CPU_DEQUANTIZED = 0.4e9
_LAUNCHES_A_LAYER, _LAUNCH_S = 150, 5e-6


@dataclass(frozen=True, slots=True)
class Cost:
    """What the run amounts to. `steps` and what follows from it is None while rows are unknown."""

    flops_a_token: float
    tokens_a_second: float
    step_seconds: float
    steps: int | None
    tokens: int | None
    flops: float | None
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes that the run writes, and that it fetches first if the model is not here yet; and what
    is free where they go, None where the system does not tell."""

    output: int
    checkpoints: int
    download: int
    output_free: int | None = None
    download_free: int | None = None

    @property
    def wanting(self) -> dict[str, tuple[int, int]]:
        """What the disk has no room for: `output` or `download`, with bytes needed and free."""
        needs = {
            "output": (self.output + self.checkpoints, self.output_free),
            "download": (self.download, self.download_free),
        }
        return {
            name: (needed, free)
            for name, (needed, free) in needs.items()
            if free is not None and needed > free
        }


def flops_a_token(setting: Setting, policy: Recompute) -> float:
    """Operations of training on one token, forward, backward and recompute."""
    shapes = setting.shapes
    linear = float(sum(p.elements for p in shapes.linears))
    head, adapter = float(shapes.head_elements), float(setting.adapter_elements)
    scores = shapes.heads * shapes.head_dim * setting.document * shapes.layers
    total = 4 * (linear + head) + 7 * scores + 6 * adapter
    if setting.full:
        total += 2 * (linear + head)
    if policy != "none":
        # The product with down_proj feeds nothing that backward reads; trained, it is not left out.
        down = 0 if setting.full else shapes.layers * shapes.hidden * shapes.intermediate
        again = 2 * (linear - down) + 2 * adapter + (2 * scores if policy != "minimal" else 0)
        total += again * setting.recomputed_layers / shapes.layers
    return total


def cost(setting: Setting, policy: Recompute) -> Cost:
    """The run's amount of work, and an estimate of how long this device takes over it."""
    per_token = flops_a_token(setting, policy)
    micro = _micro_seconds(setting, policy)
    accumulation = setting.config.train.gradient_accumulation_steps
    speed = setting.micro_tokens / micro
    steps = _steps(setting)
    tokens = _tokens(setting, steps)
    return Cost(
        flops_a_token=per_token,
        tokens_a_second=speed,
        step_seconds=micro * accumulation,
        steps=steps,
        tokens=tokens,
        flops=None if tokens is None else tokens * per_token,
        seconds=None if tokens is None else tokens / speed,
    )


def disk(setting: Setting) -> Disk:
    """The adapter (or model), the checkpoints kept beside the best one, and the download."""
    trained = setting.trained_elements
    output = setting.shapes.count * 2 if setting.full else 4 * trained
    kept = setting.config.train.save_total_limit + 1
    download = 0 if is_here(setting.config.base.model) else 2 * setting.shapes.count
    place = Path(setting.config.output_dir)
    return Disk(
        output,
        kept * (4 * trained + setting.optimizer_bytes),
        download,
        # Of a run that has begun, some of it is there already.
        None if (place / "checkpoints").exists() else _free(place),
        _free(hub_cache()) if download else None,
    )


def _free(folder: Path) -> int | None:
    """Bytes free where this folder is, or would be."""
    with contextlib.suppress(OSError, ValueError):
        while not folder.exists():
            folder = folder.absolute().parent
        return shutil.disk_usage(folder).free
    return None


def paced(device: Device, taken: Sequence[tuple[Setting, float]]) -> Device:
    """The device with the bandwidth and the cost of an operation that two steps of one model took.

    `taken`: a short and a long step without recompute, with their seconds.
    """
    (short, short_s), (long, long_s) = taken
    moved = _swept_bytes(long) - _swept_bytes(short)
    beside_products = long_s - short_s - (_products_s(long, "none") - _products_s(short, "none"))
    # Where products explain all of it the sweeps are as good as free.
    bandwidth = moved / max(beside_products, 1e-3 * long_s)
    rest = short_s - _products_s(short, "none") - _swept_bytes(short) / bandwidth
    launches = (rest - _dequantizing_s(short, "none")) / _launches(short, "none")
    return replace(device, bandwidth=bandwidth, launch_s=max(launches, 1e-7))


def _micro_seconds(setting: Setting, policy: Recompute) -> float:
    launch_s = _LAUNCH_S if setting.device.launch_s is None else setting.device.launch_s
    return (
        _products_s(setting, policy)
        + _swept_bytes(setting) / setting.device.bandwidth
        + _dequantizing_s(setting, policy)
        + _launches(setting, policy) * launch_s
    )


def _products_s(setting: Setting, policy: Recompute) -> float:
    device = setting.device
    share = _SHARE[device.kind] if device.launch_s is None else 1.0  # measured, not stated
    speed = device.flops(setting.dtype) * share
    return setting.micro_tokens * flops_a_token(setting, policy) / speed


def _swept_bytes(setting: Setting) -> float:
    return _SWEEPS * kept_bytes(setting, "none") * setting.micro_tokens


def _dequantizing_s(setting: Setting, policy: Recompute) -> float:
    if setting.storage == "none":
        return 0.0
    device, linear = setting.device, sum(p.elements for p in setting.shapes.linears)
    if device.kind == "cpu":
        return _passes(policy) * linear / (device.dequantized or _CPU_DEQUANTIZED)
    return _passes(policy) * linear * (0.52 + setting.product_bytes) / device.bandwidth


def _launches(setting: Setting, policy: Recompute) -> float:
    return float(_passes(policy) * setting.shapes.layers * _LAUNCHES_A_LAYER)


def _passes(policy: Recompute) -> int:
    return 2 if policy == "none" else 3


def _tokens(setting: Setting, steps: int | None) -> int | None:
    if setting.rows and setting.config.train.max_steps is None:
        return round(setting.rows.tokens * setting.config.train.epochs)
    return None if steps is None else round(steps * setting.step_tokens)


def _steps(setting: Setting) -> int | None:
    train, rows = setting.config.train, setting.rows
    if train.max_steps is not None:
        return train.max_steps
    if rows is None:
        return None
    if setting.config.data.packing:
        an_epoch = rows.tokens / setting.step_tokens
    else:
        an_epoch = rows.rows / (train.batch_size * train.gradient_accumulation_steps)
    return max(1, math.ceil(train.epochs * math.ceil(an_epoch)))
