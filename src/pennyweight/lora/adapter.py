"""An adapter as a value: read, written, put beside a base and taken off again.

PEFT's file layout and key names live in this file and nowhere else. Binding is strict: every
tensor has a place, every target is filled, shapes and the base's fingerprint agree; all faults
come in one error.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pennyweight.config import LoraConfig
from pennyweight.errors import AdapterError
from pennyweight.lora.layer import (
    AdaptedModule,
    CopiedWeight,
    LoraFactors,
    LoraLinear,
    TrainedCopy,
    linear_shape,
    stable_seed,
)
from pennyweight.lora.targets import alpha_of, linear_modules, rank_of, target_names, targets
from pennyweight.route import Route

__all__ = [
    "Adapter",
    "Resident",
    "adapter_of",
    "attach",
    "check_name",
    "detach",
    "trained_parameters",
]

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
PREFIX = "base_model.model."
TENSORS, SETTINGS, OURS, CARD = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "pennyweight.json",
    "README.md",
)
LARGEST_SCALING = 1e4
UNSUPPORTED = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
}


@runtime_checkable
class Resident(Protocol):
    """What an adapter stands beside: a base model with its route and identity."""

    module: Any
    route: Route
    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """Factors A `[r, in]` and B `[out, r]` by module, and whole trained weights by module.

    `base_fingerprint` is None for adapters made elsewhere, which do not carry one; `notes` says
    what was passed over while reading.
    """

    config: LoraConfig
    factors: Mapping[str, tuple[Tensor, Tensor]]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    base_name: str = ""
    base_fingerprint: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def scaling(self, module: str) -> float:
        """alpha / r at one module, or alpha / sqrt(r) with rsLoRA."""
        r = rank_of(module, self.config)
        return alpha_of(module, self.config) / (math.sqrt(r) if self.config.use_rslora else r)

    def delta(self, module: str) -> Tensor:
        """scaling * B A of one module, `[out, in]`, in float32."""
        a, b = self.factors[module]
        return (b.float() @ a.float()) * self.scaling(module)

    @property
    def parameters(self) -> int:
        """Trained numbers in all."""
        pairs = sum(a.numel() + b.numel() for a, b in self.factors.values())
        return pairs + sum(t.numel() for t in self.saved.values())

    def save(self, folder: Path | str, *, card: str | None = None) -> Path:
        """Write PEFT's layout (`adapter_config.json`, `adapter_model.safetensors`) and a card."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for path, (a, b) in self.factors.items():
            tensors[f"{PREFIX}{path}.lora_A.weight"] = a.detach().cpu().contiguous()
            tensors[f"{PREFIX}{path}.lora_B.weight"] = b.detach().cpu().contiguous()
        for path, weight in self.saved.items():
            tensors[f"{PREFIX}{path}.weight"] = weight.detach().cpu().clone().contiguous()
        partial = folder / f".{TENSORS}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, folder / TENSORS)
        ours = {
            "format": 1,
            "base": {"name": self.base_name, "fingerprint": self.base_fingerprint},
            "loraplus_lr_ratio": self.config.loraplus_lr_ratio,
            **self.about,
        }
        _write_json(folder / OURS, ours)
        _write_text(folder / CARD, card or _card(self))
        _write_json(folder / SETTINGS, _to_peft(self))
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Adapter:
        """Read a folder in PEFT's layout; AdapterError names every fault at once."""
        folder = Path(folder)
        settings = _read_json(folder / SETTINGS, f"{folder}: not an adapter; it has no {SETTINGS}")
        config, faults, notes = _from_peft(settings, folder / SETTINGS)
        factors, saved, tensor_faults = _read_tensors(folder)
        faults += tensor_faults
        if config is not None:
            faults += [
                fault
                for path, pair in factors.items()
                if (fault := _rank_fault(path, pair, config))
            ]
        if faults or config is None:
            raise AdapterError.all(faults[:20])
        ours: dict[str, Any] = {}
        if (folder / OURS).is_file():
            ours = _read_json(folder / OURS, "")
        base = ours.get("base") if isinstance(ours.get("base"), dict) else {}
        ratio = ours.get("loraplus_lr_ratio")
        if isinstance(ratio, int | float) and ratio > 0:
            config = config.model_copy(update={"loraplus_lr_ratio": float(ratio)})
        return cls(
            config=config,
            factors=factors,
            saved=saved,
            base_name=str(base.get("name") or settings.get("base_model_name_or_path") or ""),
            base_fingerprint=base.get("fingerprint"),
            about={
                k: v for k, v in ours.items() if k not in ("format", "base", "loraplus_lr_ratio")
            },
            notes=tuple(notes),
        )


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
    _bind(base, adapter)
    device = next(base.module.parameters()).device
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


def adapter_of(base: Resident, name: str, config: LoraConfig) -> Adapter:
    """The attached adapter as a value; its tensors are the live masters, not copies."""
    factors, saved = {}, {}
    for path, layer in base.module.named_modules():
        if isinstance(layer, AdaptedModule) and name in layer:
            inner = layer.of(name)
            if isinstance(inner, LoraFactors):
                factors[path] = (inner.lora_A, inner.lora_B)
            else:
                saved[path] = inner.weight
    if not factors and not saved:
        raise AdapterError(
            f"no adapter named {name!r} is attached; attached are: {', '.join(attached(base)) or 'none'}"
        )
    return Adapter(config, factors, saved, base_name=base.name, base_fingerprint=base.fingerprint)


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


def _fresh(base: Resident, config: LoraConfig, seed: int) -> Adapter:
    layers = linear_modules(base.module)
    device = next(base.module.parameters()).device
    factors = {}
    for path in targets(layers, config.target_modules, head=_head_path(base)):
        d_out, d_in = _shape(layers[path])
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


def _bind(base: Resident, adapter: Adapter) -> None:
    """Refuse, all at once, what does not fit this base."""
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
        elif (b.shape[0], a.shape[1]) != _shape(layers[path]):
            d_out, d_in = _shape(layers[path])
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
    if faults:
        raise AdapterError.all(faults[:20])


def _unfilled(base: Resident, adapter: Adapter, layers: Mapping[str, nn.Module]) -> list[str]:
    """Modules the adapter's own target list means, without factors in it."""
    spec = adapter.config.target_modules
    if not isinstance(spec, str):
        spec = tuple(t for t in spec if any(n == t or n.endswith("." + t) for n in layers))
        if not spec:
            return []
    wanted = targets(layers, spec, head=_head_path(base))
    limit = adapter.about.get("layers_to_transform")
    if limit is not None:
        wanted = tuple(
            n for n in wanted if any(part.isdigit() and int(part) in limit for part in n.split("."))
        )
    excluded = adapter.about.get("exclude_modules") or []
    return [
        n
        for n in wanted
        if n not in adapter.factors and not any(n == e or n.endswith("." + e) for e in excluded)
    ]


def _attach_copies(base: Resident, saved: Mapping[str, Tensor], name: str, trainable: bool) -> None:
    """Full trained copies; the copies of tied weights are one parameter."""
    shared: dict[int, nn.Parameter] = {}
    device = next(base.module.parameters()).device
    for path, weight in saved.items():
        base_weight = _plain(base.module.get_submodule(path)).weight
        key = base_weight.data_ptr()
        if key not in shared:
            shared[key] = nn.Parameter(
                weight.to(device, torch.float32, copy=True), requires_grad=trainable
            )
        _adapted(base, path, TrainedCopy).put(name, CopiedWeight(shared[key]))


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


def _plain(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, AdaptedModule) else layer


def _shape(layer: nn.Module) -> tuple[int, int]:
    return linear_shape(_plain(layer))


def _head_path(base: Resident) -> str | None:
    head = base.module.get_output_embeddings()
    return next((n for n, m in base.module.named_modules() if m is head), None)


def _rank_fault(path: str, pair: tuple[Tensor, Tensor], config: LoraConfig) -> str | None:
    a, b = pair
    want = rank_of(path, config)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        return f"{path}: factors of shape {tuple(a.shape)} and {tuple(b.shape)} do not multiply"
    if a.shape[0] != want:
        return f"{path}: factors of rank {a.shape[0]}, the config says {want}"
    return None


def _read_tensors(
    folder: Path,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], list[str]]:
    path = folder / TENSORS
    if not path.is_file():
        other = folder / "adapter_model.bin"
        why = (
            "; adapter_model.bin is a pickle, which can run code and is never read"
            if other.is_file()
            else ""
        )
        raise AdapterError(f"{folder}: no {TENSORS}{why}")
    halves: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    faults: list[str] = []
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                _place(key, tensor, halves, saved, faults)
    except (SafetensorError, OSError) as fault:
        raise AdapterError(f"{path}: not a whole safetensors file ({fault})") from fault
    for module, half in halves.items():
        if len(half) < 2:
            faults.append(
                f"{module}: only {'A' if 'A' in half else 'B'} is there, the other factor is missing"
            )
    pairs = {m: (h["A"], h["B"]) for m, h in halves.items() if len(h) == 2}
    if not pairs and not saved and not faults:
        faults.append(f"{path}: holds no factors at all")
    return pairs, saved, faults


def _place(
    key: str,
    tensor: Tensor,
    halves: dict[str, dict[str, Tensor]],
    saved: dict[str, Tensor],
    faults: list[str],
) -> None:
    match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", key)
    if not tensor.is_floating_point():
        faults.append(f"{key}: holds {tensor.dtype}, factors are floating point")
    elif not torch.isfinite(tensor).all():
        faults.append(f"{key}: holds NaN or infinity")
    elif match:
        halves.setdefault(match[1], {})[match[2]] = tensor
    elif key.startswith(PREFIX) and key.endswith(".weight") and "lora_" not in key:
        saved[key.removeprefix(PREFIX).removesuffix(".weight").replace(".modules_to_save", "")] = (
            tensor
        )
    else:
        faults.append(f"{key}: a tensor with no place in a LoRA adapter")


def _to_peft(adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    spec = config.target_modules
    names = adapter.about.get("target_names") or (
        sorted(adapter.factors) if isinstance(spec, str) else list(spec)
    )
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": names,
        "modules_to_save": sorted(adapter.saved) or None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": bool(adapter.about.get("fan_in_fan_out", False)),
        "init_lora_weights": True,
    }


def _from_peft(
    settings: Mapping[str, Any], path: Path
) -> tuple[LoraConfig | None, list[str], list[str]]:
    """A LoraConfig from adapter_config.json, the faults found, and notes on what was passed over."""
    faults, notes = [], []
    if settings.get("peft_type") != "LORA":
        faults.append(
            f"{path}: peft_type is {settings.get('peft_type')!r}; only LORA adapters are read"
        )
    for key, plain in UNSUPPORTED.items():
        if settings.get(key) not in plain:
            faults.append(
                f"{path}: {key} = {settings.get(key)!r} changes the formula and is not supported"
            )
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and init.split("_")[0].lower() in ("pissa", "olora", "corda", "loftq"):
        notes.append(
            f"init_lora_weights = {init!r}: right only beside the base it was converted for"
        )
    fields = {
        key: settings[key]
        for key in (
            "r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "use_rslora",
            "rank_pattern",
            "alpha_pattern",
        )
        if settings.get(key) is not None
    }
    fields["modules_to_save"] = tuple(settings.get("modules_to_save") or ())
    try:
        config = LoraConfig(**fields)
    except ValueError as fault:
        details = getattr(fault, "errors", list)()
        faults += [f"{path}: {'.'.join(map(str, d['loc']))}: {d['msg']}" for d in details] or [
            f"{path}: {fault}"
        ]
        return None, faults, notes
    scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    if not math.isfinite(scaling) or scaling > LARGEST_SCALING:
        faults.append(
            f"{path}: lora_alpha {config.lora_alpha:g} over r {config.r} scales by {scaling:g}; is it a typo?"
        )
    return config, faults, notes


def _card(adapter: Adapter) -> str:
    base = adapter.base_name or "an unnamed base"
    front = (
        f"---\nlibrary_name: peft\ntags: [lora, pennyweight]\nbase_model: {json.dumps(base)}\n---\n"
    )
    return (
        f"{front}\n# A LoRA adapter for {base}\n\n"
        f"Rank {adapter.config.r}, alpha {adapter.config.lora_alpha:g}, {adapter.parameters:,} trained parameters "
        f"beside {len(adapter.factors)} modules.\n\n"
        f"Base fingerprint: `{adapter.base_fingerprint}`. Load it with PEFT, or with `pennyweight chat`.\n"
    )


def _read_json(path: Path, absent: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(absent) from None
    except (OSError, ValueError, RecursionError) as fault:
        raise AdapterError(f"{path}: not readable as JSON ({fault})") from fault
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: holds a {type(value).__name__}, not settings")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def described(adapter: Adapter, base: Resident, **about: Any) -> Adapter:
    """The adapter with what PEFT wants to know of its base: short target names, Conv1D weights."""
    layers = linear_modules(base.module)
    plain = [_plain(layers[p]) for p in adapter.factors]
    return replace(
        adapter,
        about={
            **adapter.about,
            "target_names": target_names(list(adapter.factors), list(layers)),
            "fan_in_fan_out": any(
                type(p).__name__ == "Conv1D" or getattr(p, "fan_in_fan_out", False) for p in plain
            ),
            **about,
        },
    )
