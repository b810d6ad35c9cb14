"""General text, for what tuning makes a model forget: plain prose that is on every machine.

The built-in text is the reference that `help()` prints (`pydoc_data.topics`): English prose and
code, written by the Python documentation's authors, read from the Python that runs. The built-in
base model never saw it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.compare.folder import write_text
from pennyweight.config import DataConfig
from pennyweight.data.examples import Examples
from pennyweight.data.prepare import prepare
from pennyweight.errors import DataError

__all__ = ["general_examples", "passages"]

PASSAGE_CHARS = 700


def general_examples(
    named: str, rows: int, tokenizer: Any, *, max_length: int, stop_id: int | None, folder: Path
) -> Examples:
    """Up to `rows` documents of the text, every token of them trained, at most `max_length` long.

    `named` is `builtin` or whatever `data.train` takes. `folder`: where the built-in text is put.
    """
    path, form = named, "auto"
    if named == "builtin":
        path, form = str(_written(folder / "general.jsonl")), "text"
    settings = DataConfig.model_validate(
        {
            "train": path,
            "format": form,
            "eval_fraction": 0,
            "train_on": "all",
            "max_length": max_length,
            # Prose may be cut anywhere, and nothing is learned from it.
            "max_cut_share": 1,
            "max_duplicate_share": 1,
            "max_unknown_share": 1,
        }
    )
    try:
        found = prepare(settings, tokenizer, seed=0, stop_id=stop_id).train
    except DataError as fault:
        raise DataError(f"compare.general_text: {fault}") from fault
    # Evenly over the whole text: its first documents may be all of one kind.
    chosen = np.linspace(0, len(found) - 1, min(rows, len(found))).round().astype(int)
    return Examples.of([found[int(i)] for i in chosen])


def passages() -> Iterator[str]:
    """Runs of whole paragraphs of at most 700 characters or one paragraph, in shuffled fixed order."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "compare.general_text: this Python came without pydoc_data, the built-in text; name a "
            "file of plain text"
        ) from None
    found = [passage for text in topics.values() for passage in _joined(text.split("\n\n"))]
    unique = dict.fromkeys(passage for passage in found if len(passage) >= PASSAGE_CHARS // 4)
    yield from sorted(unique, key=lambda text: hashlib.sha256(text.encode()).digest())


def _joined(paragraphs: list[str]) -> Iterator[str]:
    held = ""
    for paragraph in paragraphs:
        if held and len(held) + len(paragraph) > PASSAGE_CHARS:
            yield held.strip()
            held = ""
        held += ("\n\n" if held else "") + paragraph
    if held.strip():
        yield held.strip()


def _written(path: Path) -> Path:
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in passages()))
    return path
