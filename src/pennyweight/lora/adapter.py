"""An adapter as a value: its factors and config, read from a folder and written to one."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pennyweight.config import LoraConfig
from pennyweight.errors import AdapterError
from pennyweight.lora.card import card as card_of
from pennyweight.lora.peft_layout import (
    SETTINGS,
    TENSORS,
    config_from,
    narrowing,
    product_fault,
    read_json,
    read_tensors,
    settings_of,
    strange_settings,
    targeted,
    tensors_of,
    write_json,
    write_tensors,
    write_text,
)
from pennyweight.lora.targets import alpha_of, ends_with, rank_of

__all__ = ["Adapter", "content_hash"]

OURS, CARD = "pennyweight.json", "README.md"
FINGERPRINT = re.compile(r"[0-9a-f]{1,128}")
KEPT_APART = ("format", "base", "loraplus_lr_ratio")


@dataclass(frozen=True, slots=True)
class Adapter:
    """Factors A `[r, in]` and B `[out, r]` by module, and whole trained weights by module.

    `base_fingerprint` is None for adapters made elsewhere, which do not carry one; `notes` says
    what was passed over while reading. `along` holds values of the base itself, by parameter,
    that are saved with the adapter; the base it is put beside must have the same.
    """

    config: LoraConfig
    factors: Mapping[str, tuple[Tensor, Tensor]]
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    base_name: str = ""
    base_fingerprint: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    along: Mapping[str, Tensor] = field(default_factory=dict)

    def scaling(self, module: str) -> float:
        """alpha / r at one module, or alpha / sqrt(r) with rsLoRA."""
        return scaling_of(module, self.config)

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
        """Write PEFT's layout (`adapter_config.json`, `adapter_model.safetensors`) and a card.

        The settings come last: a folder that has them is whole.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / TENSORS, tensors_of(self.factors, self.saved, self.along))
        ours = {
            "format": 1,
            "base": {"name": self.base_name, "fingerprint": self.base_fingerprint},
            "loraplus_lr_ratio": self.config.loraplus_lr_ratio,
            **self.about,
        }
        settings = settings_of(
            self.config,
            self.about,
            base_name=self.base_name,
            factors=self.factors,
            saved=self.saved,
        )
        write_json(folder / OURS, ours)
        write_text(folder / CARD, card or card_of(self))
        write_json(folder / SETTINGS, settings)
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Adapter:
        """Read a folder in PEFT's layout; AdapterError names every fault at once."""
        folder = Path(folder)
        settings = read_json(folder, SETTINGS)
        if settings is None:
            raise AdapterError(f"{folder}: not an adapter{_why_not(folder)}")
        config, faults, notes = config_from(settings, folder / SETTINGS)
        factors, saved, along, tensor_faults = read_tensors(folder, None if faults else config)
        ours = read_json(folder, OURS) or {}
        faults += [*tensor_faults, *_strange(ours, folder / OURS)]
        if config is not None and not faults:
            scalings = {path: scaling_of(path, config) for path in factors}
            found = (product_fault(p, pair, scalings[p]) for p, pair in factors.items())
            faults += [fault for fault in found if fault]
        if faults or config is None:
            raise AdapterError.all(faults[:20])
        base = ours.get("base") or {}
        if ratio := ours.get("loraplus_lr_ratio"):
            config = config.model_copy(update={"loraplus_lr_ratio": float(ratio)})
        return cls(
            config=config,
            factors=factors,
            saved=saved,
            base_name=str(base.get("name") or settings.get("base_model_name_or_path") or ""),
            base_fingerprint=base.get("fingerprint"),
            about={k: v for k, v in ours.items() if k not in KEPT_APART} | narrowing(settings),
            notes=(*notes, *_idle_targets(config, factors, narrowing(settings))),
            along=along,
        )


def scaling_of(module: str, config: LoraConfig) -> float:
    """alpha / r at one module, or alpha / sqrt(r) with rsLoRA."""
    r = rank_of(module, config)
    return alpha_of(module, config) / (math.sqrt(r) if config.use_rslora else r)


def content_hash(adapter: Adapter) -> str:
    """SHA-256 of what the adapter adds to its base: every tensor with its place and type, the settings
    that scale them, and the base's fingerprint. It names an immutable version.

    How targets were spelled, dropout and notes change nothing that the adapter says, so they are not
    in it, and saving and loading again leaves it as it is.
    """
    digest = hashlib.sha256()

    def add(*entry: Any, tensor: Tensor | None = None) -> None:
        if tensor is not None:
            entry = (*entry, str(tensor.dtype), list(tensor.shape))
        digest.update(json.dumps(entry).encode() + b"\n")
        if tensor is not None:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)

    config = adapter.config
    add("pennyweight adapter", 1, adapter.base_fingerprint)
    add(config.r, float(config.lora_alpha), config.use_rslora)
    add(sorted(config.rank_pattern.items()))
    add(sorted((module, float(alpha)) for module, alpha in config.alpha_pattern.items()))
    for module in sorted(adapter.factors):
        a, b = adapter.factors[module]
        add(module, "A", tensor=a)
        add(module, "B", tensor=b)
    for module in sorted(adapter.saved):
        add(module, "whole", tensor=adapter.saved[module])
    return digest.hexdigest()


def _why_not(folder: Path) -> str:
    if folder.is_file():
        return "; it is a file, and an adapter is a folder: unpack an archive first"
    return f"; it has no {SETTINGS}" if folder.is_dir() else "; there is no such folder"


def _strange(ours: Mapping[str, Any], path: Path) -> list[str]:
    """What in our own file is not what `save` writes."""
    base = ours.get("base")
    ratio, names = ours.get("loraplus_lr_ratio"), ours.get("target_names")
    fits = {
        "base": base is None
        or (
            isinstance(base, dict)
            and isinstance(base.get("name", ""), str)
            and isinstance(mark := base.get("fingerprint") or "0", str)
            and FINGERPRINT.fullmatch(mark) is not None
        ),
        "loraplus_lr_ratio": ratio is None or (type(ratio) in (int, float) and 0 < ratio < 1e9),
        "target_names": names is None
        or (isinstance(names, list) and all(isinstance(name, str) for name in names)),
    }
    faults = [f"{key}: not what was written there" for key, good in fits.items() if not good]
    return [f"{path}: {fault}" for fault in (*faults, *strange_settings(ours))]


def _idle_targets(
    config: LoraConfig, factors: Mapping[str, object], about: Mapping[str, Any]
) -> list[str]:
    """A note on names in the target list that no factor belongs to; PEFT passes them over."""
    if isinstance(config.target_modules, str):
        return []
    excluded = {"exclude_modules": about.get("exclude_modules")}
    asked = [t for t in config.target_modules if targeted(t, (t,), excluded)]
    idle = [t for t in asked if not any(ends_with(n, t) for n in factors)]
    if not idle:
        return []
    return [f"target_modules names {', '.join(sorted(idle))}, for which the file has no factors"]
