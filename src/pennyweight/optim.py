"""AdamW (Loshchilov & Hutter 2019) over an adapter's masters, its learning-rate schedule, and its
state as named tensors. Weight decay is decoupled; LoRA+ (Hayou et al. 2024) trains B faster than A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import DiskError

__all__ = ["adamw", "load_state_tensors", "lr_at", "set_learning_rate", "state_tensors"]

_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
_MOMENTS = ("exp_avg", "exp_avg_sq")


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


def adamw(
    parameters: Mapping[str, nn.Parameter],
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    loraplus_lr_ratio: float | None = None,
) -> torch.optim.Optimizer:
    """AdamW over named parameters, its moments made at once, so that memory is known before step 1.

    LoRA's B (names with `lora_B`) gets `loraplus_lr_ratio` times the learning rate. Parameters of
    one dimension (norms, biases) do not decay. An optimizer that keeps its moments elsewhere is
    made here too, and is a `torch.optim.Optimizer` with the same parameter groups and state.
    """
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters.items():
        faster = loraplus_lr_ratio if loraplus_lr_ratio and "lora_B" in name else 1.0
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((faster, decay), []).append((name, parameter))
    assert groups, "nothing to train"
    devices = {p.device.type for members in groups.values() for _, p in members}
    optimizer = torch.optim.AdamW(
        [
            {"params": members, "weight_decay": decay, "lr_ratio": faster}
            for (faster, decay), members in groups.items()
        ],
        lr=0.0,
        betas=betas,
        eps=eps,
        fused=devices <= _FUSED_DEVICES,
    )
    optimizer.register_step_post_hook(_counted)
    for _, parameter, group in _named(optimizer):
        where = parameter.device if group["fused"] else torch.device("cpu")
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=where),
            **{moment: torch.zeros_like(parameter) for moment in _MOMENTS},
        }
    return optimizer


def _counted(optimizer: torch.optim.Optimizer, *_how: object) -> None:
    """Fused steps do not count as changes of a tensor (torch 2.13), and whoever keeps what was made
    of a parameter goes by that count."""
    for _, parameter, _ in _named(optimizer):
        torch.autograd.graph.increment_version(parameter)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group `rate` times its own ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_ratio"]


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts by parameter name: `model.layers.0.q.lora_A/exp_avg` and so on."""
    return {
        f"{name}/{part}": value.detach()
        for name, parameter, _ in _named(optimizer)
        for part, value in optimizer.state[parameter].items()
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `state_tensors` gave into an optimizer over the same parameters.

    DiskError names every tensor that is missing, unknown or of another shape; then nothing is copied.
    """
    here = state_tensors(optimizer)
    faults = [f"optimizer state: {name} is missing" for name in here.keys() - tensors.keys()]
    faults += [f"optimizer state: {name} is unknown" for name in tensors.keys() - here.keys()]
    faults += [
        f"optimizer state: {name} is {list(tensors[name].shape)}, this run needs {list(value.shape)}"
        for name, value in here.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if faults:
        raise DiskError.all(sorted(faults))
    for name, value in here.items():
        value.copy_(tensors[name])


def _named(
    optimizer: torch.optim.Optimizer,
) -> Iterator[tuple[str, nn.Parameter, dict[str, object]]]:
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            yield name, parameter, group
