"""Sources to conversations on a disk: mixed by weight, split, with what must be known of all first."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pennyweight.data import dataset
from pennyweight.data.conversation import Conversation
from pennyweight.data.prepare.recipe import Recipe
from pennyweight.data.read import Faults
from pennyweight.data.spool import Spool

__all__ = ["Rows", "read", "resolved", "split"]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Conversations of one part, and of each: `times` it is trained by its source's weight, the key
    of what it `asked` (0 where no rows are to be held out by it), whether it is a `chat`, its
    `answers` and those of them that are `reasoned`.
    """

    spool: Spool
    times: np.ndarray
    asked: np.ndarray
    chat: np.ndarray
    answers: np.ndarray
    reasoned: np.ndarray

    def view(self, places: np.ndarray) -> Rows:
        seen = {name: getattr(self, name)[places] for name in self.__slots__ if name != "spool"}
        return replace(self, spool=self.spool.view(places), **seen)

    def __len__(self) -> int:
        return len(self.spool)


@dataclass(slots=True)
class _Traits:
    """What is noted of each row as it goes by."""

    asked: array[int] = field(default_factory=lambda: array("Q"))
    chat: array[int] = field(default_factory=lambda: array("b"))
    answers: array[int] = field(default_factory=lambda: array("q"))
    reasoned: array[int] = field(default_factory=lambda: array("q"))

    def note(self, row: Conversation, seed: int | None) -> None:
        answers = [message for message in row.messages if message.role == "assistant"]
        self.asked.append(0 if seed is None else dataset.asked_key(row, seed))
        self.chat.append(row.kind == "chat")
        self.answers.append(len(answers))
        self.reasoned.append(sum("reasoning_content" in message.extra for message in answers))


def read(
    sources: Sequence[dataset.Located], recipe: Recipe, spool: Spool, faults: Faults
) -> tuple[Rows, list[str]]:
    """The rows that are taken of these sources, in their order, and what was found."""
    times: list[np.ndarray] = [np.zeros(0, np.int64)]
    traits, notes = _Traits(), []
    seed = recipe.seed if recipe.held is None and recipe.config.eval_fraction else None
    for place in sources:
        source, before = place.source, len(spool)
        found = dataset.read(place, recipe.config.columns, faults)
        for row in found:
            spool.append(row)
            traits.note(row, seed)
        count = len(spool) - before
        times.append(dataset.weighted(count, source.weight, seed=recipe.seed, name=source.path))
        weight = "" if source.weight == 1 else f", weight {source.weight:g}: {times[-1].sum():,}"
        found_by = "found" if place.format == "auto" else "named"
        notes.append(f"{source.path}: {count:,} rows{weight}, format {found.format} ({found_by})")
    noted = {name: np.array(getattr(traits, name)) for name in traits.__slots__}
    rows = Rows(spool, np.concatenate(times), **noted)
    return rows.view(np.flatnonzero(rows.times)), notes


def split(rows: Rows, fraction: float, *, seed: int) -> tuple[Rows, Rows, str]:
    """Rows to train on, rows held out, and a note of what was kept together."""
    apart = dataset.held_out(rows.asked, fraction)
    together = "no question"
    if apart is None:
        together = "no row"
        said = (dataset.said_key(row, seed) for row in rows.spool)
        apart = dataset.held_out_by_row(np.fromiter(said, np.uint64, len(rows)), fraction)
    note = f"held out {int(apart.sum()):,} rows by hash; {together} is on both sides"
    return rows.view(np.flatnonzero(~apart)), rows.view(np.flatnonzero(apart)), note


def resolved(recipe: Recipe, rows: Rows) -> dict[str, Any]:
    """The template's name and whether answers carry reasoning, decided once for the run."""
    template = recipe.config.template
    if template == "auto" and not getattr(recipe.tokenizer, "chat_template", None):
        template = "turns" if rows.chat.any() else "plain"
    thinking = bool(rows.reasoned.sum() * 2 > rows.answers.sum())
    return {"template": template, "thinking": thinking, "day": recipe.day}
