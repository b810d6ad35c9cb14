"""An adapter's folder as PEFT lays it out: `adapter_config.json` and `adapter_model.safetensors`.

The names of PEFT's files, keys and settings live in this file and nowhere else. Reading is strict
and collects every fault; what is passed over is said in notes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pennyweight.config import LoraConfig
from pennyweight.errors import AdapterError
from pennyweight.files import whole
from pennyweight.lora.targets import ends_with, rank_of

__all__ = [
    "SETTINGS",
    "TENSORS",
    "config_from",
    "narrowing",
    "read_json",
    "read_tensors",
    "settings_of",
    "targeted",
    "tensors_of",
    "write_json",
    "write_tensors",
    "write_text",
]

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST_SCALING = 1e4
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
}
CONVERTED = ("pissa", "olora", "corda", "loftq", "lora")
# What narrows PEFT's target list; kept beside the adapter as it was found.
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
TYING = "ensure_weight_tying"
# PEFT writes the base's own embedding or head along when factors stand beside it.
ALONG = ".base_layer"


def settings_of(
    config: LoraConfig,
    about: Mapping[str, Any],
    *,
    base_name: str,
    factors: Iterable[str],
    saved: Iterable[str],
) -> dict[str, Any]:
    """The content of adapter_config.json."""
    spec = config.target_modules
    names = about.get("target_names") or (sorted(factors) if isinstance(spec, str) else list(spec))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": names,
        "modules_to_save": sorted(saved) or None,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": bool(about.get("fan_in_fan_out", False)),
        "init_lora_weights": True,
    }
    return settings | narrowing(about)


def narrowing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of PEFT's settings those that narrow the target list or tie copies, where they are set."""
    found = {key: settings.get(key) for key in (*NARROWING, TYING)}
    return {k: v for k, v in found.items() if v is not None and v is not False and v != []}


def config_from(
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
    if isinstance(init, str) and init.split("_")[0].lower() in CONVERTED:
        notes.append(
            f"init_lora_weights = {init!r}: right only beside the base it was converted for"
        )
    config = _lora_config(settings, path, faults)
    if config is not None:
        scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        if not math.isfinite(scaling) or scaling > LARGEST_SCALING:
            faults.append(
                f"{path}: lora_alpha {config.lora_alpha:g} over r {config.r} scales by {scaling:g}; is it a typo?"
            )
    return config, faults, notes


def _lora_config(settings: Mapping[str, Any], path: Path, faults: list[str]) -> LoraConfig | None:
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
    patterns = ("rank_pattern", "alpha_pattern")
    fields = {k: settings[k] for k in (*names, *patterns) if settings.get(k) is not None}
    fields["modules_to_save"] = tuple(settings.get("modules_to_save") or ())
    try:
        return LoraConfig(**fields)
    except ValueError as fault:
        details: list[dict[str, Any]] = getattr(fault, "errors", list)()
        faults += [f"{path}: {'.'.join(map(str, d['loc']))}: {d['msg']}" for d in details] or [
            f"{path}: {fault}"
        ]
        return None


def targeted(name: str, spec: Iterable[str], about: Mapping[str, Any]) -> bool:
    """Whether PEFT's target list `spec`, narrowed by what `about` holds, means the module `name`.

    `exclude_modules` is a list of names or a pattern; `layers_to_transform` counts the first
    numbered part of the name, the one under `layers_pattern` where that is given.
    """
    excluded = about.get("exclude_modules") or ()
    if isinstance(excluded, str):
        if re.fullmatch(excluded, name):
            return False
    elif any(ends_with(name, e) for e in excluded):
        return False
    if not any(ends_with(name, t) for t in spec):
        return False
    layers = about.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    under = about.get("layers_pattern") or r"[^.]*"
    under = under if isinstance(under, str) else "|".join(under)
    index = re.match(rf"(?:^|.*?\.)(?:{under})\.(\d+)\.", name)
    return index is not None and int(index[1]) in (layers if isinstance(layers, list) else [layers])


def tensors_of(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    saved: Mapping[str, Tensor],
    along: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The content of adapter_model.safetensors; `read_tensors` is the inverse.

    Of what goes along only biases of modules trained whole are written: PEFT asks for them.
    """
    tensors = {}
    for path, (a, b) in factors.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = b.detach().cpu().contiguous()
    for path, weight in saved.items():
        tensors[f"{PREFIX}{path}.weight"] = weight.detach().cpu().clone().contiguous()
    for name, value in along.items():
        if name.removesuffix(".bias") in saved:
            tensors[f"{PREFIX}{name}"] = value.detach().cpu().clone().contiguous()
    return tensors


def read_tensors(
    folder: Path,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Tensor], list[str]]:
    """Factors by module, whole weights by module, what goes along by parameter, the faults found."""
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
    along: dict[str, Tensor] = {}
    faults: list[str] = []
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                _place(key, file.get_tensor(key), halves, (saved, along), faults)
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
    return pairs, saved, along, faults


def _place(
    key: str,
    tensor: Tensor,
    halves: dict[str, dict[str, Tensor]],
    whole: tuple[dict[str, Tensor], dict[str, Tensor]],
    faults: list[str],
) -> None:
    saved, along = whole
    name = key.removeprefix(PREFIX).replace(".modules_to_save", "")
    known = key.startswith(PREFIX) and "lora_" not in key
    match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", key)
    if not tensor.is_floating_point():
        faults.append(f"{key}: holds {tensor.dtype}, factors are floating point")
    elif not torch.isfinite(tensor).all():
        faults.append(f"{key}: holds NaN or infinity")
    elif match:
        halves.setdefault(match[1], {})[match[2]] = tensor
    elif known and name.endswith((f"{ALONG}.weight", ".bias")):
        along[name.replace(ALONG, "")] = tensor
    elif known and name.endswith(".weight"):
        saved[name.removesuffix(".weight")] = tensor
    else:
        faults.append(f"{key}: a tensor with no place in a LoRA adapter")


def rank_fault(path: str, pair: tuple[Tensor, Tensor], config: LoraConfig) -> str | None:
    """What is wrong with the shapes of A `[r, in]` and B `[out, r]`, or None."""
    a, b = pair
    want = rank_of(path, config)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        return f"{path}: factors of shape {tuple(a.shape)} and {tuple(b.shape)} do not multiply"
    if a.shape[0] != want:
        return f"{path}: factors of rank {a.shape[0]}, the config says {want}"
    return None


def read_json(path: Path, absent: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(absent) from None
    except (OSError, ValueError, RecursionError) as fault:
        raise AdapterError(f"{path}: not readable as JSON ({fault})") from fault
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: holds a {type(value).__name__}, not settings")
    return value


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with whole(path) as partial:
        save_file(dict(tensors), partial, metadata={"format": "pt"})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
