"""AdamW (Loshchilov & Hutter 2019) over an adapter's masters, and its state as named tensors.

Weight decay is decoupled; LoRA+ (Hayou et al. 2024) trains B faster than A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from pennyweight.errors import DiskError
from pennyweight.optim.paged import PagedAdamW

__all__ = ["Kind", "adamw", "load_state_tensors", "state_tensors"]

Kind = Literal["adamw_torch", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"]

_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}
_MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw(
    parameters: Mapping[str, nn.Parameter],
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    loraplus_lr_ratio: float | None = None,
    kind: Kind = "adamw_torch",
    resident_bytes: int | None = None,
) -> torch.optim.Optimizer:
    """AdamW over named parameters, its moments made at once, so that memory is known before step 1.

    LoRA's B (names with `lora_B`) gets `loraplus_lr_ratio` times the learning rate. Parameters of
    one dimension (norms, biases) do not decay. Kinds in 8 bits hold moments in blocks; paged ones
    keep at most `resident_bytes` of their state on the device between steps (None: all of it,
    until memory is wanted), and learn the same to the bit wherever it lies.
    """
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters.items():
        faster = loraplus_lr_ratio if loraplus_lr_ratio and "lora_B" in name else 1.0
        decay = weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((faster, decay), []).append((name, parameter))
    assert groups, "nothing to train"
    devices = {p.device.type for members in groups.values() for _, p in members}
    described = [
        {"params": members, "weight_decay": decay, "lr_ratio": faster}
        for (faster, decay), members in groups.items()
    ]
    if kind != "adamw_torch":
        paged = kind.startswith("paged")
        small = PagedAdamW(
            described,
            betas=betas,
            eps=eps,
            eight_bits=kind.endswith("8bit"),
            paged=paged,
            resident_bytes=resident_bytes if paged else None,
        )
        small.register_step_post_hook(_counted)
        return small
    optimizer = torch.optim.AdamW(
        described,
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
