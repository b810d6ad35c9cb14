"""What became of every row: its tokens, what is trained, what was cut, what was dropped and why."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pennyweight.files import whole

__all__ = ["Ledger", "LedgerRow"]


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One source row. `tokens`: before the cut; `cut`: tokens lost to max_length; `times`: by weight.

    A row ends with the stop token of its last trained turn, so one that is cut loses at least that.
    `unknown`: tokens that stand for text the tokenizer has no token for. `same_as`: the first row
    with the same tokens. A row whose turns became several examples counts them all.
    """

    source: str
    part: str  # train or eval
    examples: int
    tokens: int
    trained_tokens: int
    cut: int
    times: int = 1
    dropped: str | None = None
    unknown: int = 0
    same_as: str | None = None

    def values(self) -> list[str | int | None]:
        """In the order of the fields: `LedgerRow(*row.values()) == row`."""
        return [getattr(self, name) for name in self.__slots__]


@dataclass(frozen=True, slots=True)
class Ledger:
    """The rows of a run and what is to be said about them."""

    rows: tuple[LedgerRow, ...]
    notes: tuple[str, ...] = ()

    def part(self, name: str) -> tuple[LedgerRow, ...]:
        return tuple(row for row in self.rows if row.part == name)

    def summary(self, part: str = "train") -> dict[str, Any]:
        """Counts for a report; plain JSON. Reasons are counted without the numbers in them."""
        rows = self.part(part)
        kept = [row for row in rows if row.dropped is None]
        return {
            "rows": len(rows),
            "kept": len(kept),
            "examples": sum(row.examples * row.times for row in kept),
            "tokens": sum((row.tokens - row.cut) * row.times for row in kept),
            "trained_tokens": sum(row.trained_tokens * row.times for row in kept),
            "cut_rows": sum(row.cut > 0 for row in kept),
            "cut_tokens": sum(row.cut * row.times for row in kept),
            "unknown_tokens": sum(row.unknown * row.times for row in kept),
            "repeated_rows": sum(row.same_as is not None for row in kept),
            "dropped": len(rows) - len(kept),
            "dropped_why": dict(_reasons(rows)),
        }

    def lines(self) -> list[str]:
        """A few lines for people."""
        said = []
        for part in ("train", "eval"):
            s = self.summary(part)
            if not s["rows"]:
                continue
            said.append(
                f"{part}: {s['kept']:,} of {s['rows']:,} rows, {s['tokens']:,} tokens, "
                f"{s['trained_tokens']:,} trained; {s['cut_rows']:,} rows cut "
                f"({s['cut_tokens']:,} tokens lost), {s['dropped']:,} dropped"
            )
            said += [f"  dropped {n:,}: {why}" for why, n in s["dropped_why"].items()]
            said += [f"  {s[name]:,} {what}" for name, what in _ALSO.items() if s[name]]
        return [*said, *self.notes]

    def write(self, path: Path) -> None:
        """`ledger.jsonl`: one line a row, in the order of the data."""
        with whole(path) as partial, partial.open("w", encoding="utf-8") as file:
            for row in self.rows:
                file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")


_ALSO = {
    "unknown_tokens": "tokens stand for text that the tokenizer has no token for",
    "repeated_rows": "rows have the same tokens as an earlier one",
}


def _reasons(rows: Sequence[LedgerRow]) -> list[tuple[str, int]]:
    """Alike reasons together, told by one of them."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        if row.dropped is not None:
            alike = re.sub(r"\d+", "#", row.dropped)[:80]
            first.setdefault(alike, row.dropped)
            counts[alike] += 1
    return [(first[alike], count) for alike, count in counts.most_common(10)]
