"""What became of every row: its tokens, what is trained, what was cut, what was dropped and why."""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from pennyweight.data.arrays import GrowingTexts, Texts
from pennyweight.files import whole

__all__ = ["Ledger", "LedgerRow", "LedgerRows", "LedgerWriter"]

_PARTS = ("train", "eval")
_COUNTS = ("examples", "tokens", "trained_tokens", "cut", "times", "unknown")


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


class LedgerRows(Sequence[LedgerRow]):
    """Rows as columns, so that a million take 100 MB; each is made when it is looked at.

    `part` is an index of `_PARTS`, `reason` one of `reasons` and `same_as` one of a row, -1 where
    there is none. `chosen` are the places a view shows.
    """

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        sources: Texts,
        reasons: Texts,
        chosen: np.ndarray | None = None,
    ) -> None:
        self._columns, self._sources, self._reasons = columns, sources, reasons
        self._chosen = np.arange(len(sources)) if chosen is None else chosen

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> LedgerRows:
        """The rows that gave these arrays."""
        columns = {
            name: arrays[f"ledger.{name}"] for name in ("part", *_COUNTS, "reason", "same_as")
        }
        sources, reasons = (
            Texts(arrays[f"ledger.{name}"], arrays[f"ledger.{name}.ends"])
            for name in ("sources", "reasons")
        )
        return cls(columns, sources, reasons)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it, to be stored; not of a view."""
        assert len(self._chosen) == len(self._sources), "a view is not what is stored"
        found = {f"ledger.{name}": values for name, values in self._columns.items()}
        for name, texts in (("sources", self._sources), ("reasons", self._reasons)):
            found |= {f"ledger.{name}": texts.letters, f"ledger.{name}.ends": texts.ends}
        return found

    def column(self, name: str) -> np.ndarray:
        """One count of every row, int64 `[rows]`."""
        values: np.ndarray = self._columns[name][self._chosen]
        return values

    def where(self, mask: np.ndarray) -> LedgerRows:
        """The rows where the mask is set."""
        return LedgerRows(self._columns, self._sources, self._reasons, self._chosen[mask])

    def of_part(self, part: str) -> LedgerRows:
        return self.where(self.column("part") == _PARTS.index(part))

    @property
    def kept(self) -> LedgerRows:
        return self.where(self.column("reason") < 0)

    @property
    def dropped(self) -> LedgerRows:
        return self.where(self.column("reason") >= 0)

    @property
    def repeated(self) -> LedgerRows:
        """Those with the same tokens as an earlier one."""
        return self.where(self.column("same_as") >= 0)

    @property
    def repeated_of_training(self) -> LedgerRows:
        """Those with the same tokens as an earlier one that is trained on."""
        again = self.repeated
        parts = self._columns["part"][again.column("same_as")]
        return again.where(parts == _PARTS.index("train"))

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> LedgerRow: ...
    @overload
    def __getitem__(self, index: slice) -> LedgerRows: ...
    def __getitem__(self, index: int | slice) -> LedgerRow | LedgerRows:
        if isinstance(index, slice):
            return LedgerRows(self._columns, self._sources, self._reasons, self._chosen[index])
        at = int(self._chosen[index])
        reason, same_as = int(self._columns["reason"][at]), int(self._columns["same_as"][at])
        return LedgerRow(
            self._sources[at],
            _PARTS[int(self._columns["part"][at])],
            **{name: int(self._columns[name][at]) for name in _COUNTS},
            dropped=None if reason < 0 else self._reasons[reason],
            same_as=None if same_as < 0 else self._sources[same_as],
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LedgerRows):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class LedgerWriter:
    """The ledger as rows become examples. Which rows are alike is told by `digest`, at the end."""

    def __init__(self) -> None:
        self._columns = {name: array("q") for name in ("part", *_COUNTS, "reason")}
        self._sources, self._reasons = GrowingTexts(), GrowingTexts()
        self._reason_count = 0
        self._digests = bytearray()

    def keep(self, source: str, part: str, digest: bytes, **counts: int) -> None:
        """A row that gave examples; `digest`: 16 bytes, equal for rows of the same tokens."""
        assert len(digest) == 16
        self._add(source, part, -1, digest, counts)

    def drop(self, source: str, part: str, reason: str, *, times: int) -> None:
        """A row that gave none."""
        self._reasons.add(reason)
        self._add(source, part, self._reason_count, bytes(16), {"times": times})
        self._reason_count += 1

    def _add(
        self, source: str, part: str, reason: int, digest: bytes, counts: Mapping[str, int]
    ) -> None:
        self._sources.add(source)
        self._columns["part"].append(_PARTS.index(part))
        self._columns["reason"].append(reason)
        for name in _COUNTS:
            self._columns[name].append(counts.get(name, 0))
        self._digests += digest

    def finished(self) -> LedgerRows:
        columns = {name: np.array(values, np.int64) for name, values in self._columns.items()}
        halves = np.frombuffer(self._digests, np.uint64).reshape(-1, 2)
        columns["same_as"] = _first_alike(halves, columns["reason"] < 0)
        return LedgerRows(columns, self._sources.finished(), self._reasons.finished())


def _first_alike(halves: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For each row the first with the same two halves, -1 where that is itself; `counts`: which do."""
    same = np.full(len(halves), -1, np.int64)
    rows = np.flatnonzero(counts)
    if not len(rows):
        return same
    by_digest = rows[np.lexsort((rows, halves[rows, 0], halves[rows, 1]))]
    begins = np.r_[True, (halves[by_digest[1:]] != halves[by_digest[:-1]]).any(1)]
    firsts = by_digest[begins][np.cumsum(begins) - 1]
    same[by_digest] = np.where(firsts == by_digest, -1, firsts)
    return same


@dataclass(frozen=True, slots=True)
class Ledger:
    """The rows of a run and what is to be said about them."""

    rows: LedgerRows
    notes: tuple[str, ...] = ()

    def part(self, name: str) -> LedgerRows:
        return self.rows.of_part(name)

    def summary(self, part: str = "train") -> dict[str, Any]:
        """Counts for a report; plain JSON. Reasons are counted without the numbers in them."""
        rows = self.part(part)
        kept = rows.kept
        times, cut = kept.column("times"), kept.column("cut")
        return {
            "rows": len(rows),
            "kept": len(kept),
            "examples": int(kept.column("examples") @ times),
            "tokens": int((kept.column("tokens") - cut) @ times),
            "trained_tokens": int(kept.column("trained_tokens") @ times),
            "cut_rows": int((cut > 0).sum()),
            "cut_tokens": int(cut @ times),
            "unknown_tokens": int(kept.column("unknown") @ times),
            "repeated_rows": len(kept.repeated),
            "dropped": len(rows) - len(kept),
            "dropped_why": dict(_reasons(rows.dropped)),
        }

    def lines(self) -> list[str]:
        """A few lines for people."""
        said = []
        for part in _PARTS:
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


def _reasons(rows: Iterable[LedgerRow]) -> list[tuple[str, int]]:
    """Alike reasons together, told by one of them."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        assert row.dropped is not None
        alike = re.sub(r"\d+", "#", row.dropped)[:80]
        first.setdefault(alike, row.dropped)
        counts[alike] += 1
    return [(first[alike], count) for alike, count in counts.most_common(10)]
