"""Steps, tokens, floating-point operations, seconds and disk of a run.

A token costs, with N linear parameters, h = d * vocabulary, P adapter parameters, L layers and
documents of s tokens: forward 2N + 2h + 2dsL + 2P; gradients of inputs 2N + 2h, of attention
5dsL, of the adapter 4P; recomputing adds 2N + 2dsL + 2P. Full fine-tuning adds 2N + 2h for the
weights' own gradients (arithmetic from the shapes; a product of m x k x n counts 2mkn).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pennyweight.plan.activations import kept_bytes
from pennyweight.plan.outline import is_here
from pennyweight.plan.setting import Recompute, Setting

__all__ = ["Cost", "Disk", "cost", "disk", "flops_a_token"]

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
    """Bytes that the run writes, and that it fetches first if the model is not here yet."""

    output: int
    checkpoints: int
    download: int


def flops_a_token(setting: Setting, policy: Recompute) -> float:
    """Operations of training on one token, forward, backward and recompute."""
    shapes = setting.shapes
    linear = float(sum(p.elements for p in shapes.linears))
    head, adapter = float(shapes.head_elements), float(setting.adapter_elements)
    scores = shapes.heads * shapes.head_dim * setting.document * shapes.layers
    total = 4 * (linear + head) + 7 * scores + 6 * adapter
    if setting.full:
        total += 2 * (linear + head)
    if policy == "minimal":
        down = shapes.layers * shapes.hidden * shapes.intermediate
        total += 2 * (linear - down) + 2 * adapter
    elif policy != "none":
        total += 2 * linear + 2 * scores + 2 * adapter
    return total


def cost(setting: Setting, policy: Recompute) -> Cost:
    """The run's amount of work, and an estimate of how long this device takes over it."""
    per_token = flops_a_token(setting, policy)
    micro = _micro_seconds(setting, policy, per_token)
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
    here = is_here(setting.config.base.model)
    return Disk(output, kept * 12 * trained, 0 if here else 2 * setting.shapes.count)


def _micro_seconds(setting: Setting, policy: Recompute, per_token: float) -> float:
    device, tokens = setting.device, setting.micro_tokens
    kind = device.kind
    products = tokens * per_token / (device.flops(setting.dtype) * _SHARE[kind])
    swept = _SWEEPS * kept_bytes(setting, "none") * tokens / device.bandwidth
    passes = 2 if policy == "none" else 3
    linear = sum(p.elements for p in setting.shapes.linears)
    if setting.storage == "none":
        dequantized = 0.0
    elif kind == "cpu":
        dequantized = passes * linear / _CPU_DEQUANTIZED
    else:
        dequantized = passes * linear * (0.52 + setting.product_bytes) / device.bandwidth
    launches = passes * setting.shapes.layers * _LAUNCHES_A_LAYER * _LAUNCH_S
    return products + swept + dequantized + launches


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
