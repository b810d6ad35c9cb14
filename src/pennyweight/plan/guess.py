"""How much data a config names, guessed from the first megabyte of each file and its size.

Good enough for steps and hours before any tokenizer is loaded; a run counts exactly.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.config import DataConfig, Source
from pennyweight.plan.setting import DataSize

__all__ = ["guess_rows"]

_SAMPLE_BYTES = 2**20
_SUFFIXES = (".jsonl", ".json", ".csv")
_TEMPLATE_TOKENS = 6  # around each text of a row: role, separators


@dataclass(frozen=True, slots=True)
class _Sample:
    """Characters and texts of sampled rows, and the rows that the whole file should have."""

    characters: tuple[int, ...]
    texts: float
    rows: float


def guess_rows(data: DataConfig, vocab: int) -> DataSize | None:
    """Rows and tokens of the training data, or None where it is no local JSON Lines, JSON or CSV."""
    named = [data.train] if isinstance(data.train, str | Source) else list(data.train)
    sources = [Source(path=s) if isinstance(s, str) else s for s in named]
    rows = tokens = 0.0
    longest = 0
    per_token = _characters_a_token(vocab)
    for source in sources:
        files = _files(Path(source.path))
        samples = [_sample(file) for file in files]
        if not files or any(sample is None for sample in samples):
            return None
        for sample in samples:
            assert sample is not None
            lengths = [
                min(data.max_length, math.ceil(n / per_token + sample.texts * _TEMPLATE_TOKENS))
                for n in sample.characters
            ]
            share = source.weight * (1.0 if data.eval is not None else 1.0 - data.eval_fraction)
            rows += share * sample.rows
            tokens += share * sample.rows * sum(lengths) / max(1, len(lengths))
            longest = max(longest, *lengths, 0)
    if not rows:
        return None
    # Longer rows than any in the sample are likely elsewhere in a file that was not read whole.
    return DataSize(max(1, round(rows)), max(1, round(tokens)), max(8, longest), exact=False)


def _characters_a_token(vocab: int) -> float:
    """About 2.2 for a vocabulary of 512, 3.9 for 32 thousand, 4.4 for 128 thousand (English)."""
    return max(1.0, 0.27 * math.log2(max(2, vocab)) - 0.2)


def _files(path: Path) -> list[Path]:
    found = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    return [p for p in found if p.is_file() and _suffix(p) in _SUFFIXES]


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _sample(path: Path) -> _Sample | None:
    """The rows of the file's beginning, scaled to its size; None if they cannot be read."""
    size = path.stat().st_size
    try:
        with path.open("rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
            head = file.read(_SAMPLE_BYTES)
            if isinstance(file, gzip.GzipFile):
                size = size * len(head) // max(1, raw.tell())
            whole = not file.read(1)
            if _suffix(path) == ".json" and not whole:
                head, whole = head + file.read(), True
        rows = list(_rows(head.decode("utf-8", errors="replace"), _suffix(path), whole))
    except (OSError, ValueError, EOFError, csv.Error):
        return None  # the data room says what is wrong with it
    if not rows:
        return None
    texts = [list(_texts(row)) for row in rows]
    return _Sample(
        characters=tuple(sum(map(len, row)) for row in texts),
        texts=sum(map(len, texts)) / len(texts),
        rows=len(rows) if whole else len(rows) * size / len(head),
    )


def _rows(text: str, suffix: str, whole: bool) -> Iterator[Any]:
    if suffix == ".csv":
        yield from csv.DictReader(io.StringIO(text))
        return
    if suffix == ".json" and text.lstrip().startswith("["):
        yield from json.loads(text)
        return
    lines = text.splitlines()
    for line in lines if whole else lines[:-1]:
        if line.strip():
            yield json.loads(line)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a row that a model would read: values, not keys, roles or ids."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ("role", "from", "id", "weight"):
                yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)
