"""The model card of an adapter that no run stands behind, and the front matter of every card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pennyweight.config import public_name

if TYPE_CHECKING:
    from pennyweight.lora.adapter import Adapter

__all__ = ["card", "front_matter", "in_code"]


def card(adapter: Adapter) -> str:
    """Markdown with YAML front matter, from what the adapter itself knows."""
    base = _one_line(public_name(adapter.base_name)) or "an unnamed base"
    quantization = adapter.about.get("base_quantization")
    lines = [
        front_matter(library_name="peft", tags=["lora", "pennyweight"], base_model=base),
        f"# A LoRA adapter for {in_code(base)}",
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
        f"Base fingerprint: `{adapter.base_fingerprint}`. Load it with PEFT, or merge it with "
        "`pennyweight merge`.",
    ]
    return "\n".join(lines) + "\n"


def front_matter(**fields: Any) -> str:
    """The YAML block that the Hub reads; what is None or empty is left out."""
    from huggingface_hub import ModelCardData

    known = {name: value for name, value in fields.items() if value}
    return f"---\n{ModelCardData(**known).to_yaml()}\n---\n"


def in_code(text: str) -> str:
    """A name as inline code of Markdown, which it cannot break out of."""
    return f"`{_one_line(text).replace('`', '')}`"


def _one_line(text: str) -> str:
    return " ".join(text.split())
