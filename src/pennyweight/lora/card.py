"""The model card written beside an adapter: what the Hub and a reader want to know of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pennyweight.lora.adapter import Adapter

__all__ = ["card"]


def card(adapter: Adapter) -> str:
    """Markdown with YAML front matter; JSON strings are YAML strings, so no name can break out."""
    base = " ".join(adapter.base_name.split()) or "an unnamed base"
    quantization = adapter.about.get("base_quantization")
    front = ["---", "library_name: peft", "tags: [lora, pennyweight]"]
    front.append(f"base_model: {json.dumps(base)}")
    lines = [
        *front,
        "---",
        "",
        f"# A LoRA adapter for {base}",
        "",
        f"Rank {adapter.config.r}, alpha {adapter.config.lora_alpha:g}, {adapter.parameters:,} trained parameters "
        f"beside {len(adapter.factors)} modules.",
    ]
    if adapter.saved:
        lines.append(f"Trained whole: {', '.join(sorted(adapter.saved))}.")
    if quantization:
        lines.append(f"Trained beside the base held as {quantization}.")
    lines += [
        "",
        f"Base fingerprint: `{adapter.base_fingerprint}`. Load it with PEFT, or with `pennyweight chat`.",
    ]
    return "\n".join(lines) + "\n"
