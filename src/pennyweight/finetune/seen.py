"""What a run would learn from, seen before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pennyweight.config import RunConfig, resolve
from pennyweight.data.ledger import Ledger
from pennyweight.data.limits import past_limits
from pennyweight.data.prepare import prepare
from pennyweight.data.preview import Shown, named_rows, preview
from pennyweight.files import disk_faults, make_folder
from pennyweight.model import load_tokenizer, stop_ids
from pennyweight.report import plot_rows

__all__ = ["Seen", "look"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What a run would learn from: rows with their trained parts marked, and the ledger's lines.

    `refusal`: why `finetune` would refuse this data, a line each; empty where it would not.
    """

    shown: tuple[Shown, ...]
    lines: tuple[str, ...]
    summary: dict[str, Any]
    rendering: dict[str, Any]
    refusal: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def look(
    config: RunConfig, rows: int = 3, *, named: Sequence[str] = (), out: Path | None = None
) -> Seen:
    """Render the data without reading a weight; with `out`, also write its ledger and histogram.

    `named`: rows by `file:line`, or by line, in place of the first ones.
    """
    config = resolve(config)
    tokenizer = load_tokenizer(config.base.model)
    ends = stop_ids(config.base.model, tokenizer)
    stop_id = ends[0] if ends else None
    data = prepare(config.data, tokenizer, seed=config.seed, stop_id=stop_id, limited=False)
    shown = named_rows(data, config.data, named) if named else preview(data, rows)
    lines = data.ledger.lines()
    if out is not None:
        with disk_faults(out, "name another folder, or make room"):
            make_folder(out)
            data.ledger.write(out / "ledger.jsonl")
            absent = _draw(data.ledger, out / "ledger.png", config.data.max_length)
        drawn = absent or f"drawn in {out / 'ledger.png'}"
        lines.append(f"every row is in {out / 'ledger.jsonl'}; {drawn}")
    return Seen(
        shown=tuple(shown),
        lines=tuple(lines),
        summary=data.ledger.summary(),
        rendering=data.renderer.describe(),
        refusal=tuple(past_limits(data.ledger, config.data)),
    )


def _draw(ledger: Ledger, path: Path, max_length: int) -> str | None:
    """The training rows as a picture; why not, where there is none."""
    kept = [row for row in ledger.part("train") if row.dropped is None]
    return plot_rows(
        [row.tokens for row in kept],
        [row.trained_tokens for row in kept],
        [row.cut for row in kept],
        path,
        max_length=max_length,
        dropped=ledger.summary()["dropped_why"],
    )
