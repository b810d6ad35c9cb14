"""What people have heard about memory, recomputed with this plan's own arithmetic.

`tables()` is the text between the markers of docs/memory.md, which
`python -m pennyweight.plan.claims docs/memory.md` renews; a test holds the page to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pennyweight.config import BaseConfig, DataConfig, LoraConfig, RunConfig, TrainConfig
from pennyweight.plan.devices import DEVICES
from pennyweight.plan.memory import Part, parts, peak
from pennyweight.plan.setting import Recompute, Setting
from pennyweight.shapes import Shapes, dense_shapes

__all__ = ["CLAIMS", "PUBLISHED", "Claim", "held", "tables"]

PUBLISHED: dict[str, Shapes] = {
    shapes.name: shapes
    for shapes in (
        dense_shapes(
            "Qwen3-0.6B",
            layers=28,
            hidden=1024,
            intermediate=3072,
            heads=16,
            kv_heads=8,
            head_dim=128,
            vocab=151936,
            max_positions=40960,
            tied=True,
            qk_norm=True,
        ),
        dense_shapes(
            "Llama-2-7B", layers=32, hidden=4096, intermediate=11008, heads=32, vocab=32000
        ),
        dense_shapes(
            "Mistral-7B",
            layers=32,
            hidden=4096,
            intermediate=14336,
            heads=32,
            kv_heads=8,
            vocab=32000,
            max_positions=32768,
        ),
        dense_shapes(
            "Llama-3-8B",
            layers=32,
            hidden=4096,
            intermediate=14336,
            heads=32,
            kv_heads=8,
            vocab=128256,
            max_positions=8192,
        ),
        dense_shapes(
            "Llama-2-13B", layers=40, hidden=5120, intermediate=13824, heads=40, vocab=32000
        ),
        dense_shapes(
            "Llama-65B",
            layers=80,
            hidden=8192,
            intermediate=22016,
            heads=64,
            vocab=32000,
            max_positions=2048,
        ),
        dense_shapes(
            "Llama-2-70B",
            layers=80,
            hidden=8192,
            intermediate=28672,
            heads=64,
            kv_heads=8,
            vocab=32000,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence people have heard, and the run it is about.

    `lean`: embeddings in host memory and 8-bit moments in pages there, beside the policy.
    """

    heard: str
    model: str
    method: str
    tokens: int
    policy: Recompute
    lean: bool = False


CLAIMS: tuple[Claim, ...] = (
    Claim("7B in full: 56 GB and more", "Llama-2-7B", "full", 512, "full"),
    Claim("7B with 16-bit LoRA: 12 to 16 GB", "Llama-2-7B", "lora", 512, "full"),
    Claim("65B with QLoRA: one 48 GB card", "Llama-65B", "qlora", 512, "full"),
    Claim("65B with QLoRA: one 48 GB card; lean", "Llama-65B", "qlora", 2048, "offloaded", True),
    Claim("8B with QLoRA: 6 GB", "Llama-3-8B", "qlora", 512, "full"),
    Claim("8B with QLoRA: 6 GB; lean", "Llama-3-8B", "qlora", 2048, "offloaded", True),
    Claim("Mistral-7B in 4 bits: about 4 GB", "Mistral-7B", "qlora", 512, "full"),
)


def held(
    model: str, method: str, tokens: int, policy: Recompute, *, lean: bool = False
) -> tuple[Part, ...]:
    """Parts of one row of so many tokens on a card: rank 16 on all linear layers, bfloat16."""
    config = RunConfig(
        base=BaseConfig(model=model, dtype="bfloat16", embedding_device="host" if lean else "auto"),
        adapter=LoraConfig(r=16),
        data=DataConfig(max_length=tokens),
        train=TrainConfig(
            method=method,  # type: ignore[arg-type]
            batch_size=1,
            optim="paged_adamw_8bit" if lean else "adamw_torch",
        ),
    )
    setting = Setting(config, PUBLISHED[model], DEVICES["h200"], optimizer_on_host=lean)
    return parts(setting, policy)


def tables() -> str:
    """The two tables of docs/memory.md."""
    return f"{_claims()}\n\n{_models()}"


def _claims() -> str:
    rows = [
        "| what people have heard | tokens | weights | trained state | rest | allocated | with process |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for claim in CLAIMS:
        found = held(claim.model, claim.method, claim.tokens, claim.policy, lean=claim.lean)
        total, moment = peak(found, allocated=True)
        at_peak = [p for p in found if moment in p.moments and p.allocated]
        weights = _sum(at_peak, ("linear weights", "embeddings, head, norms"))
        trained = _sum(at_peak, ("adapter", "gradients", "gradients so far", "optimizer"))
        cells = (weights, trained, total - weights - trained, total, peak(found)[0])
        sizes = " | ".join(f"{size / 1e9:.1f}" for size in cells)
        rows.append(f"| {claim.heard} | {claim.tokens} | {sizes} |")
    return "\n".join(rows)


def _models() -> str:
    rows = [
        "| QLoRA, r = 16, 2,048 tokens | weights | recompute none | full | of which logits | lean | 16-bit LoRA, full | full fine-tuning, full |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in PUBLISHED:
        sparing = held(name, "qlora", 2048, "full")
        cells = (
            _sum(sparing, ("linear weights", "embeddings, head, norms")),
            peak(held(name, "qlora", 2048, "none"), allocated=True)[0],
            peak(sparing, allocated=True)[0],
            _sum(sparing, ("loss",)),
            peak(held(name, "qlora", 2048, "offloaded", lean=True), allocated=True)[0],
            peak(held(name, "lora", 2048, "full"), allocated=True)[0],
            peak(held(name, "full", 2048, "full"), allocated=True)[0],
        )
        rows.append(f"| {name} | " + " | ".join(f"{size / 1e9:.2f}" for size in cells) + " |")
    return "\n".join(rows)


def _sum(found: Iterable[Part], names: tuple[str, ...]) -> int:
    return sum(p.bytes for p in found if p.name in names)


def _renew(page: Path) -> None:
    """Write the tables between the page's markers."""
    before, start, rest = page.read_text(encoding="utf-8").partition("<!-- tables -->\n")
    _, stop, after = rest.partition("\n<!-- end of tables -->")
    page.write_text(before + start + tables() + stop + after, encoding="utf-8")


if __name__ == "__main__":
    _renew(Path(sys.argv[1]))
