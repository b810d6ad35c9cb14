"""What a run would learn from, seen before any weight is read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pennyweight.config import RunConfig, resolve
from pennyweight.data.prepare import prepare
from pennyweight.data.preview import Shown, draw, preview
from pennyweight.model import load_tokenizer, stop_ids

__all__ = ["Seen", "look"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a run would learn from: rows with their trained parts marked, and the ledger's lines."""

    shown: tuple[Shown, ...]
    lines: tuple[str, ...]
    summary: dict[str, Any]
    rendering: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def look(config: RunConfig, rows: int = 3, *, out: Path | None = None) -> Seen:
    """Render the data without reading a weight; with `out`, also write its ledger and histogram."""
    config = resolve(config)
    tokenizer = load_tokenizer(config.base.model)
    ends = stop_ids(config.base.model, tokenizer)
    data = prepare(config.data, tokenizer, seed=config.seed, stop_id=ends[0] if ends else None)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        data.ledger.write(out / "ledger.jsonl")
        draw(data.ledger, out / "ledger.png", max_length=config.data.max_length)
    return Seen(
        shown=tuple(preview(data, rows)),
        lines=tuple(data.ledger.lines()),
        summary=data.ledger.summary(),
        rendering=data.renderer.describe(),
    )
