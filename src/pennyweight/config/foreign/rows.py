"""Where another tool's rows are, and what they look like: the sources of `data.train` and `data.eval`."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pennyweight.config.foreign.account import Account

__all__ = ["first_keys", "local_path", "put_sources"]

_HEAD_BYTES = 1 << 20


def local_path(path: str, beside: Path) -> str:
    """A path as a run started here would find it: as written, or beside the imported file."""
    if Path(path).expanduser().exists() or not (beside / path).exists():
        return path
    return str(beside / path)


def first_keys(path: str) -> frozenset[str] | None:
    """The keys of the first row of a JSONL, JSON or CSV file; None where it cannot be told."""
    file = Path(path).expanduser()
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD_BYTES).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    head = head.removeprefix("\ufeff").lstrip()
    if file.suffix in (".csv", ".tsv"):
        separator = "\t" if file.suffix == ".tsv" else ","
        return frozenset(next(csv.reader([head.split("\n", 1)[0]], delimiter=separator), []))
    if file.suffix not in (".jsonl", ".json", ".ndjson"):
        return None
    try:
        row, _ = json.JSONDecoder().raw_decode(head.removeprefix("[").lstrip())
    except (ValueError, RecursionError):
        return None
    return frozenset(row) if isinstance(row, dict) else None


def put_sources(
    account: Account, train: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]
) -> None:
    """Write sources as shortly as they allow: format and columns once where all have the same, and
    a bare path where nothing else is left to say."""
    both = [*train, *held]
    if len({json.dumps([s.get("format"), s.get("columns")]) for s in both}) == 1:
        for name in ("format", "columns"):
            if value := both[0].get(name):
                account.run[f"data.{name}"] = value
        both = [{k: v for k, v in s.items() if k not in ("format", "columns")} for s in both]
    told = [{k: v for k, v in s.items() if v is not None} for s in both]
    short = [s["path"] if set(s) == {"path"} else s for s in told]
    for to, several in (("data.train", short[: len(train)]), ("data.eval", short[len(train) :])):
        if several:
            account.run[to] = several[0] if len(several) == 1 else several
