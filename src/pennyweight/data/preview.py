"""What a run would learn from: rows as text, with the part that is trained and the part that is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from pennyweight.config import DataConfig
from pennyweight.data import dataset
from pennyweight.data.chat import Renderer
from pennyweight.data.conversation import Conversation, Dropped, Example
from pennyweight.data.ledger import LedgerRow
from pennyweight.data.prepare import Prepared, located
from pennyweight.data.read import Faults, nearest
from pennyweight.errors import DataError

__all__ = ["Segment", "Shown", "named_rows", "preview", "segments"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens alike in whether they are trained, and whether they are cut off."""

    text: str
    trained: bool
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Shown:
    """One example for reading. The segments' texts in a row are the example, specials included.

    A row that gives no example has its reason in `dropped`; its segments are then what it would
    have been, or its messages where it cannot be rendered.
    """

    source: str
    segments: tuple[Segment, ...]
    tokens: int
    trained_tokens: int
    length_before_cut: int
    part: str = "train"
    dropped: str | None = None


def preview(prepared: Prepared, rows: int = 3) -> list[Shown]:
    """The first examples of the training set."""
    return [
        _shown(prepared.renderer, prepared.train[i]) for i in range(min(rows, len(prepared.train)))
    ]


def named_rows(prepared: Prepared, config: DataConfig, wanted: Sequence[str]) -> list[Shown]:
    """Rows by file and line (`my.jsonl:17`), or by line alone, held-out and dropped ones too.

    Their sources are read again, so that what a cut takes away is shown as well. Raises DataError
    naming each row that is not there.
    """
    found: dict[str, LedgerRow] = {}
    faults = []
    for name in wanted:
        rows = [r for r in prepared.ledger.rows if r.source == name or _line(r.source) == name]
        found |= {row.source: row for row in rows}
        if not rows:
            some = [row.source for row in prepared.ledger.rows[:10_000]]
            near = nearest(name, some) or f"; the first is {some[0]}"
            faults.append(f"{name}: no such row, by file and line or by line{near}")
    if faults:
        raise DataError.all(faults)
    whole = prepared.renderer.uncut()
    return [
        shown
        for conversation in _conversations(config, set(found))
        for shown in _looked_up(whole, conversation, found[conversation.source], config.max_length)
    ]


def _line(source: str) -> str:
    return source.rpartition(":")[2]


def _conversations(config: DataConfig, wanted: set[str]) -> list[Conversation]:
    """The wanted rows, in the order of the data."""
    faults = Faults()
    training, held = located(config)
    places = [*training, *(held or ())]
    read = (row for place in places for row in dataset.read(place, config.columns, faults))
    by_source = {row.source: row for row in read if row.source in wanted}
    return list(by_source.values())


def _looked_up(
    whole: Renderer, conversation: Conversation, row: LedgerRow, max_length: int
) -> list[Shown]:
    outcome = whole.render(conversation)
    if isinstance(outcome, Dropped):
        text = "\n".join(f"{m.role}: {m.content}" for m in conversation.messages)
        segments = (Segment(text, trained=False),)
        return [Shown(row.source, segments, 0, 0, 0, row.part, row.dropped)]
    shown = []
    for example in outcome:
        kept = 0 if row.dropped else min(len(example.ids), max_length)
        told = _shown(whole, example, cut_at=max_length)
        trained = int(example.trained[:kept].sum())
        shown.append(
            replace(told, tokens=kept, trained_tokens=trained, part=row.part, dropped=row.dropped)
        )
    return shown


def _shown(renderer: Renderer, example: Example, cut_at: int | None = None) -> Shown:
    return Shown(
        example.source,
        segments(renderer, example, cut_at),
        len(example.ids),
        int(example.trained.sum()),
        example.length_before_cut,
    )


def segments(
    renderer: Renderer, example: Example, cut_at: int | None = None
) -> tuple[Segment, ...]:
    """Each segment's text is what it adds to the text before it, so characters of several tokens
    and spaces that only stand between tokens come out as in the whole. What follows the token
    `cut_at` is cut."""
    length = len(example.ids)
    cut_at = length if cut_at is None else min(cut_at, length)
    changes = np.flatnonzero(np.diff(example.trained.astype(np.int8))) + 1
    bounds = sorted({0, *changes.tolist(), cut_at, length})
    ids = example.ids.tolist()
    found, before = [], ""
    for start, stop in pairwise(bounds):
        text = renderer.decode(ids[:stop], skip_special_tokens=False)
        if not text.startswith(before):
            text = before + renderer.decode(ids[start:stop], skip_special_tokens=False)
        found.append(Segment(text[len(before) :], bool(example.trained[start]), start >= cut_at))
        before = text
    return tuple(found)
