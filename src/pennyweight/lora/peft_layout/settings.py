"""`adapter_config.json`: PEFT's settings, to and from a LoraConfig.

Reading is strict and collects every fault; what is passed over is said in notes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pennyweight.config import LoraConfig
from pennyweight.errors import AdapterError
from pennyweight.lora.targets import ends_with
from pennyweight.patterns import Pattern, pattern

__all__ = ["config_from", "narrowing", "settings_of", "strange_settings", "targeted"]

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
MOST_PATTERNS = 5_000


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _are_layers(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(type(n) is int and 0 <= n < 10**6 for n in numbers)


# What PEFT writes there: in words, and as a test.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "modules_to_save": ("a list of names", _are_names),
    "exclude_modules": ("text or a list of names", lambda v: isinstance(v, str) or _are_names(v)),
    "layers_pattern": ("text or a list of names", lambda v: isinstance(v, str) or _are_names(v)),
    "layers_to_transform": ("a number or a list of them", _are_layers),
    "fan_in_fan_out": ("true or false", lambda v: isinstance(v, bool)),
    "ensure_weight_tying": ("true or false", lambda v: isinstance(v, bool)),
    "base_model_name_or_path": ("text", lambda v: isinstance(v, str) and len(v) < 1000),
}
# Of the settings PEFT 0.21 knows those read here, those refused, and those that change nothing.
IDLE = (
    "auto_mapping", "corda_config", "eva_config", "inference_mode", "init_lora_weights",
    "loftq_config", "lora_ga_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type", "velora_config",
)  # fmt: skip
# Read here, not checked by KINDS: LoraConfig does.
READ = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
PATTERNS = ("rank_pattern", "alpha_pattern")
KNOWN = {*READ, *PATTERNS, *KINDS, *UNSUPPORTED, *IDLE}


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
    faults += [f"{path}: {fault}" for fault in strange_settings(settings)]
    if unknown := sorted(str(key)[:60] for key in set(settings) - KNOWN):
        notes.append(f"settings that are unknown here are passed over: {', '.join(unknown[:8])}")
    if config is not None:
        faults += [f"{path}: {fault}" for fault in _strange_scaling(config)]
    return config, faults, notes


def strange_settings(settings: Mapping[str, Any]) -> list[str]:
    """Settings of another kind than PEFT writes; they would be misread further on."""
    faults = [
        f"{key}: found {str(settings[key])[:60]!r}, expected {expected}"
        for key, (expected, fits) in KINDS.items()
        if settings.get(key) is not None and not fits(settings[key])
    ]
    written = [settings.get("exclude_modules"), settings.get("layers_pattern")]
    for name in ("rank_pattern", "alpha_pattern"):
        found = settings.get(name)
        if isinstance(found, dict) and len(found) > MOST_PATTERNS:
            faults.append(f"{name}: {len(found):,} patterns; no model has so many modules")
        elif isinstance(found, dict):
            written += found
    for text in written:
        try:
            if isinstance(text, str):
                pattern(text)
        except AdapterError as fault:
            faults.append(str(fault))
    return faults


def _strange_scaling(config: LoraConfig) -> list[str]:
    ranks, alphas = config.rank_pattern.values(), config.alpha_pattern.values()
    alpha, r = max([config.lora_alpha, *alphas]), min([config.r, *ranks])
    scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
    if math.isfinite(scaling) and scaling <= LARGEST_SCALING:
        return []
    return [f"lora_alpha {alpha:g} over r {r} scales by {scaling:g}; is it a typo?"]


def _lora_config(settings: Mapping[str, Any], path: Path, faults: list[str]) -> LoraConfig | None:
    fields = {k: settings[k] for k in (*READ, *PATTERNS) if settings.get(k) is not None}
    wanted = settings.get("modules_to_save")
    fields["modules_to_save"] = tuple(wanted or ()) if _are_names(wanted) else ()
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
        if pattern(excluded).fullmatch(name):
            return False
    elif any(ends_with(name, e) for e in excluded):
        return False
    if not any(ends_with(name, t) for t in spec):
        return False
    layers = about.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    under = about.get("layers_pattern") or r"[^.]*"
    index = _layer_of(name, pattern(under if isinstance(under, str) else "|".join(under)))
    return index is not None and index in (layers if isinstance(layers, list) else [layers])


def _layer_of(name: str, under: Pattern) -> int | None:
    """The first number among the parts of a name, with a part before it that matches and one after."""
    parts = name.split(".")
    for at in range(1, len(parts) - 1):
        before = (".".join(parts[first:at]) for first in range(at))
        if parts[at].isdecimal() and any(under.fullmatch(each) for each in before):
            return int(parts[at])
    return None
