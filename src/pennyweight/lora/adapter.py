"""An adapter as a value: its factors and config, read from a folder and written to one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pennyweight.config import LoraConfig
from pennyweight.errors import AdapterError
from pennyweight.lora.card import card as card_of
from pennyweight.lora.peft_layout import (
    SETTINGS,
    TENSORS,
    config_from,
    narrowing,
    rank_fault,
    read_json,
    read_tensors,
    settings_of,
    targeted,
    tensors_of,
    write_json,
    write_tensors,
    write_text,
)
from pennyweight.lora.targets import alpha_of, ends_with, rank_of

__all__ = ["Adapter"]

OURS, CARD = "pennyweight.json", "README.md"
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
        settings = read_json(folder / SETTINGS, f"{folder}: not an adapter; it has no {SETTINGS}")
        config, faults, notes = config_from(settings, folder / SETTINGS)
        factors, saved, along, tensor_faults = read_tensors(folder)
        faults += tensor_faults
        if config is not None:
            found = (rank_fault(path, pair, config) for path, pair in factors.items())
            faults += [fault for fault in found if fault]
        if faults or config is None:
            raise AdapterError.all(faults[:20])
        ours = read_json(folder / OURS, "") if (folder / OURS).is_file() else {}
        base = ours["base"] if isinstance(ours.get("base"), dict) else {}
        ratio = ours.get("loraplus_lr_ratio")
        if isinstance(ratio, int | float) and ratio > 0:
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
