"""What a run would learn from: rows as text with the trained part marked, and the counts as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from pennyweight.data.chat import Renderer
from pennyweight.data.conversation import Example
from pennyweight.data.ledger import Ledger
from pennyweight.data.prepare import Prepared
from pennyweight.errors import DataError

__all__ = ["Segment", "Shown", "draw", "preview", "segments"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens alike in whether they are trained."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """One example for reading. The segments' texts in a row are the example, specials included."""

    source: str
    segments: tuple[Segment, ...]
    tokens: int
    trained_tokens: int
    length_before_cut: int


def preview(prepared: Prepared, rows: int = 3) -> list[Shown]:
    """The first examples of the training set."""
    return [
        _shown(prepared.renderer, prepared.train[i]) for i in range(min(rows, len(prepared.train)))
    ]


def _shown(renderer: Renderer, example: Example) -> Shown:
    return Shown(
        example.source,
        segments(renderer, example),
        len(example.ids),
        int(example.trained.sum()),
        example.length_before_cut,
    )


def segments(renderer: Renderer, example: Example) -> tuple[Segment, ...]:
    """Each segment's text is what it adds to the text before it, so characters of several tokens
    and spaces that only stand between tokens come out as in the whole."""
    changes = np.flatnonzero(np.diff(example.trained.astype(np.int8))) + 1
    bounds = [0, *changes.tolist(), len(example.ids)]
    ids = example.ids.tolist()
    found, before = [], ""
    for start, stop in pairwise(bounds):
        text = renderer.decode(ids[:stop], skip_special_tokens=False)
        if not text.startswith(before):
            text = before + renderer.decode(ids[start:stop], skip_special_tokens=False)
        found.append(Segment(text[len(before) :], bool(example.trained[start])))
        before = text
    return tuple(found)


def draw(ledger: Ledger, path: Path, *, max_length: int | None = None) -> None:
    """A histogram of tokens a row and trained tokens a row, as a picture."""
    try:
        from matplotlib.figure import Figure  # an extra; no window system is touched
    except ImportError as error:
        raise DataError(
            "the picture needs matplotlib; install it: pip install 'pennyweight[plots]'"
        ) from error
    kept = [row for row in ledger.part("train") if row.dropped is None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    series: Sequence[tuple[str, list[int]]] = (
        ("tokens", [row.tokens for row in kept]),
        ("trained tokens", [row.trained_tokens for row in kept]),
    )
    top = max((max(values, default=1) for _, values in series), default=1)
    bins = np.linspace(0, top + 1, min(60, top + 2)).tolist()
    for label, values in series:
        axes.hist(values, bins=bins, alpha=0.6, label=label)
    if max_length is not None:
        axes.axvline(max_length, color="black", linestyle="--", label=f"max_length {max_length}")
    dropped = len(ledger.part("train")) - len(kept)
    cut = sum(row.cut > 0 for row in kept)
    axes.set(
        xlabel="tokens in a row",
        ylabel="rows",
        title=f"{len(kept):,} rows kept, {cut:,} cut, {dropped:,} dropped",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
