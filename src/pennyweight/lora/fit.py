"""Whether an adapter fits a base: every tensor has a place, every target is filled, shapes agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pennyweight.errors import AdapterError
from pennyweight.lora.adapter import Adapter
from pennyweight.lora.copied import TrainedCopy
from pennyweight.lora.layer import AdaptedModule, LoraLinear, linear_shape
from pennyweight.lora.peft_layout import targeted
from pennyweight.lora.targets import linear_modules, targets
from pennyweight.route import Route

__all__ = ["Resident", "check_fit", "head_path", "plain", "shape_of"]


@runtime_checkable
class Resident(Protocol):
    """What an adapter stands beside: a base model with its route and identity."""

    module: Any
    route: Route
    name: str
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Where its adapters belong."""


def check_fit(base: Resident, adapter: Adapter) -> None:
    """Refuse with one AdapterError that names every fault what does not fit this base."""
    layers = linear_modules(base.module)
    modules = dict(base.module.named_modules())
    faults = []
    if adapter.base_fingerprint and adapter.base_fingerprint != base.fingerprint:
        faults.append(
            f"the adapter was trained beside {adapter.base_name or 'another base'} "
            f"(fingerprint {adapter.base_fingerprint[:12]}), this base is {base.name} "
            f"({base.fingerprint[:12]}): load the base it was trained beside"
        )
    for path, (a, b) in adapter.factors.items():
        if path not in layers:
            faults.append(
                f"the adapter has factors for {path}, which is no linear module of this base"
            )
        elif (b.shape[0], a.shape[1]) != shape_of(layers[path]):
            d_out, d_in = shape_of(layers[path])
            faults.append(
                f"{path}: the adapter maps {a.shape[1]} to {b.shape[0]}, the base's layer {d_in} to {d_out}"
            )
    faults += [
        f"{p}: the config targets it, the file has no factors for it"
        for p in _unfilled(base, adapter, layers)
    ]
    for path, weight in adapter.saved.items():
        if not hasattr(modules.get(path), "weight"):
            faults.append(
                f"the adapter has a trained copy of {path}, which this base does not have"
            )
        elif tuple(weight.shape) != tuple(modules[path].weight.shape):
            faults.append(
                f"{path}: trained copy {tuple(weight.shape)}, base {tuple(modules[path].weight.shape)}"
            )
    faults += [
        f"{name}: the adapter's file carries it along untrained, and this base has another value"
        for name, value in adapter.along.items()
        if not _holds(modules, name, value)
    ]
    faults += [
        f"{path}: one adapter trains it whole, another by factors; choose one way"
        for path in (*adapter.factors, *adapter.saved)
        if isinstance(modules.get(path), TrainedCopy if path in adapter.factors else LoraLinear)
    ]
    if faults:
        raise AdapterError.all(faults[:20])


def _holds(modules: Mapping[str, nn.Module], name: str, value: Tensor) -> bool:
    """Whether the base's parameter `name` is this value, in the base's type."""
    path, _, leaf = name.rpartition(".")
    module = modules.get(path)
    own = getattr(plain(module), leaf, None) if module is not None else None
    if not isinstance(own, Tensor) or own.shape != value.shape:
        return False
    return torch.equal(own.cpu(), value.detach().to("cpu", own.dtype))


def _unfilled(base: Resident, adapter: Adapter, layers: Mapping[str, nn.Module]) -> list[str]:
    """Modules the adapter's own target list means, without factors in it."""
    spec = adapter.config.target_modules
    wanted: tuple[str, ...]
    if isinstance(spec, str):
        wanted = targets(layers, spec, head=head_path(base))
        wanted = tuple(n for n in wanted if targeted(n, (n,), adapter.about))
    else:
        wanted = tuple(n for n in layers if targeted(n, spec, adapter.about))
    return [n for n in wanted if n not in adapter.factors and n not in adapter.saved]


def plain(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, AdaptedModule) else layer


def shape_of(layer: nn.Module) -> tuple[int, int]:
    return linear_shape(plain(layer))


def head_path(base: Resident) -> str | None:
    head = base.module.get_output_embeddings()
    return next((n for n, m in base.module.named_modules() if m is head), None)
