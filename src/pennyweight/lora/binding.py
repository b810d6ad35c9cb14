"""Adapters beside a base: put there, bound strictly, found again and taken off.

Every tensor has a place, every target is filled, shapes and the base's fingerprint agree; all
faults come in one error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from pennyweight.config import LoraConfig
from pennyweight.errors import AdapterError
from pennyweight.lora.adapter import Adapter
from pennyweight.lora.copied import CopiedWeight, TrainedCopy
from pennyweight.lora.fit import Resident, check_fit, head_path, plain, shape_of
from pennyweight.lora.layer import (
    AdaptedModule,
    LoraFactors,
    LoraLinear,
    stable_seed,
)
from pennyweight.lora.targets import linear_modules, rank_of, target_names, targets

__all__ = [
    "adapter_of",
    "attach",
    "attached",
    "check_name",
    "described",
    "detach",
    "is_attached",
    "parameters_of",
    "trained_parameters",
]

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_name(name: str) -> str:
    """The name if it may name an adapter: lower case, digits, `.`, `_`, `-`, at most 64; else AdapterError."""
    if not NAME.fullmatch(name):
        raise AdapterError(
            f"adapter name {name[:80]!r}: names start with a-z or 0-9 and go on with a-z, 0-9, '.', '_' or '-', "
            "64 characters at most"
        )
    return name


def attach(
    base: Resident,
    what: LoraConfig | Adapter,
    *,
    name: str = "default",
    seed: int = 0,
    trainable: bool = True,
) -> tuple[str, ...]:
    """Put an adapter beside the base's layers: fresh from a LoraConfig, or a loaded Adapter.

    Returns the modules it stands beside. A fresh adapter changes nothing (B is zero). Its masters
    are float32 on the base's device and, with `trainable`, require gradients.
    """
    check_name(name)
    if name in attached(base):
        raise AdapterError(
            f"an adapter named {name!r} is attached already; detach it first or choose another name"
        )
    adapter = what if isinstance(what, Adapter) else _fresh(base, what, seed)
    check_fit(base, adapter)
    device = base.device
    for path, (a, b) in adapter.factors.items():
        factors = LoraFactors(
            a.to(device, torch.float32, copy=True),
            b.to(device, torch.float32, copy=True),
            scaling=adapter.scaling(path),
            dropout=adapter.config.lora_dropout,
        )
        _adapted(base, path, LoraLinear).put(name, factors.requires_grad_(trainable))
    _attach_copies(base, adapter.saved, name, trainable)
    return tuple(adapter.factors)


def detach(base: Resident, name: str) -> None:
    """Take an adapter off again; the base's layers stand as before when the last one goes."""
    if name not in attached(base):
        raise AdapterError(
            f"no adapter named {name!r} is attached; attached are: {', '.join(attached(base)) or 'none'}"
        )
    for path, layer in list(base.module.named_modules()):
        if isinstance(layer, AdaptedModule) and name in layer:
            layer.drop(name)
            if not layer.names():
                base.module.set_submodule(path, layer.base_layer)


def attached(base: Resident) -> list[str]:
    """Names of the adapters beside the base."""
    names = (
        n
        for layer in base.module.modules()
        if isinstance(layer, AdaptedModule)
        for n in layer.names()
    )
    return list(dict.fromkeys(names))


def is_attached(base: Resident, name: str) -> bool:
    """Whether an adapter of this name is beside the base; found at the first layer it stands at,
    where `attached` walks through all adapters of all layers."""
    return any(
        isinstance(layer, AdaptedModule) and name in layer for layer in base.module.modules()
    )


def adapter_of(base: Resident, name: str, config: LoraConfig) -> Adapter:
    """The attached adapter as a value; its tensors are the live masters, not copies."""
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    along: dict[str, Tensor] = {}
    for path, layer in base.module.named_modules():
        if isinstance(layer, AdaptedModule) and name in layer:
            inner = layer.of(name)
            if isinstance(inner, LoraFactors):
                factors[path] = (inner.lora_A, inner.lora_B)
            else:
                saved[path] = cast(Tensor, inner.weight)
                bias = getattr(layer.base_layer, "bias", None)
                along |= {f"{path}.bias": bias} if isinstance(bias, Tensor) else {}
    if not factors and not saved:
        raise AdapterError(
            f"no adapter named {name!r} is attached; attached are: {', '.join(attached(base)) or 'none'}"
        )
    return Adapter(
        config,
        factors,
        saved,
        base_name=base.name,
        base_fingerprint=base.fingerprint,
        along=along,
    )


def trained_parameters(base: Resident, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters by `module.lora_A`, `module.lora_B` or `module.weight`; a shared copy once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, layer in base.module.named_modules():
        if isinstance(layer, AdaptedModule) and name in layer:
            for leaf, parameter in layer.of(name).named_parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    found[f"{path}.{leaf}"] = parameter
    return found


def parameters_of(base: Resident, config: LoraConfig) -> int:
    """Numbers that an adapter of this configuration trains, counted before any is made."""
    modules = linear_modules(base.module)
    shapes = {
        path: shape_of(modules[path])
        for path in targets(modules, config.target_modules, head=head_path(base))
    }
    count = sum(rank_of(path, config) * sum(shape) for path, shape in shapes.items())
    copied: dict[int, int] = {}
    for path in _copied_paths(base, config):
        weight = cast(Tensor, plain(base.module.get_submodule(path)).weight)
        copied[weight.data_ptr()] = weight.numel()
    return count + sum(copied.values())


def _fresh(base: Resident, config: LoraConfig, seed: int) -> Adapter:
    layers = linear_modules(base.module)
    device = base.device
    factors = {}
    for path in targets(layers, config.target_modules, head=head_path(base)):
        d_out, d_in = shape_of(layers[path])
        made = LoraFactors.fresh(
            d_in,
            d_out,
            rank_of(path, config),
            scaling=1.0,
            dropout=0.0,
            seed=stable_seed(seed, path),
            device=device,
        )
        factors[path] = (made.lora_A.detach(), made.lora_B.detach())
    saved = {
        path: base.module.get_submodule(path).weight.detach()
        for path in _copied_paths(base, config)
    }
    return Adapter(config, factors, saved, base_name=base.name, base_fingerprint=base.fingerprint)


def _attach_copies(base: Resident, saved: Mapping[str, Tensor], name: str, trainable: bool) -> None:
    """Full trained copies; copies of tied weights that are equal are one parameter."""
    shared: list[tuple[int, nn.Parameter]] = []
    device = base.device
    for path, weight in saved.items():
        base_weight = cast(Tensor, plain(base.module.get_submodule(path)).weight)
        value = weight.detach().to(device, torch.float32)
        same = (p for at, p in shared if at == base_weight.data_ptr() and torch.equal(p, value))
        copy = next(same, None)
        if copy is None:
            copy = nn.Parameter(value.clone(), requires_grad=trainable)
            shared.append((base_weight.data_ptr(), copy))
        _adapted(base, path, TrainedCopy).put(name, CopiedWeight(copy))


def _copied_paths(base: Resident, config: LoraConfig) -> list[str]:
    """Modules that `modules_to_save` names; of tied weights both places, for they are one."""
    modules = {
        n: m
        for n, m in base.module.named_modules()
        if isinstance(getattr(m, "weight", None), Tensor)
    }
    faults, chosen = [], []
    for wanted in config.modules_to_save:
        hits = [n for n in modules if n == wanted or n.endswith("." + wanted)]
        if not hits:
            faults.append(
                f"adapter.modules_to_save: {wanted!r} names no module of this base that holds a weight"
            )
        chosen += hits
    if faults:
        raise AdapterError.all(faults)
    pointers = {modules[n].weight.data_ptr() for n in chosen}
    return [n for n, m in modules.items() if m.weight.data_ptr() in pointers]


def _adapted(base: Resident, path: str, kind: type[AdaptedModule]) -> AdaptedModule:
    """The wrapping layer at `path`, put there if this is the first adapter."""
    layer = base.module.get_submodule(path)
    if isinstance(layer, AdaptedModule):
        if not isinstance(layer, kind):
            raise AdapterError(
                f"{path}: one adapter trains it whole, another by factors; choose one way"
            )
        return layer
    wrapped = kind(layer, base.route, path)
    base.module.set_submodule(path, wrapped)
    return wrapped


def described(adapter: Adapter, base: Resident, **about: Any) -> Adapter:
    """The adapter with what PEFT wants to know of its base: short target names, Conv1D weights, tied copies."""
    layers = linear_modules(base.module)
    kept = [plain(layers[p]) for p in adapter.factors]
    copies = [id(weight) for weight in adapter.saved.values()]
    return replace(
        adapter,
        about={
            **adapter.about,
            "target_names": target_names(list(adapter.factors), list(layers)),
            "fan_in_fan_out": any(
                type(p).__name__ == "Conv1D" or getattr(p, "fan_in_fan_out", False) for p in kept
            ),
            "ensure_weight_tying": len(set(copies)) < len(copies),
            **about,
        },
    )
