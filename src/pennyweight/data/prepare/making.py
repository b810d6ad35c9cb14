"""Rows to examples in a folder, in a stream: what is in memory does not grow with the rows' text."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.config import DataConfig
from pennyweight.data.arrays import write_array
from pennyweight.data.chat import Renderer
from pennyweight.data.conversation import Conversation, Dropped, Example
from pennyweight.data.examples import ExamplesWriter, write_manifest
from pennyweight.data.ledger import LedgerRows, LedgerWriter
from pennyweight.data.prepare.reading import Rows, read, resolved, split
from pennyweight.data.prepare.recipe import Recipe
from pennyweight.data.read import Faults
from pennyweight.data.specimens import MOST_SPECIMENS, Shapes
from pennyweight.data.spool import Spool
from pennyweight.errors import DataError

__all__ = ["make", "renderer_of"]


def make(recipe: Recipe, room: Path) -> None:
    """Fill the folder `room`: examples of both parts, the ledger, questions, specimens."""
    with closing(Spool(room)) as training, closing(Spool(room)) as held:
        train_rows, eval_rows, notes = _read(recipe, training, held)
        settled = resolved(recipe, train_rows)
        renderer = renderer_of(recipe.config, recipe.tokenizer, recipe.stop_id, settled)
        notes += renderer.describe()["notes"]
        ledger = LedgerWriter()
        trained, shown = _rendered(renderer, train_rows, "train", room, ledger)
        evaluated, shown_too = _rendered(renderer, eval_rows, "eval", room, ledger)
        arrays = {"repeated": np.repeat(np.arange(len(trained)), train_rows.times[trained])}
        found = ledger.finished()
        arrays |= found.arrays()
        for name, values in arrays.items():
            write_array(room / f"{name}.npy", values)
        facts = {
            "notes": notes + _leaks(found),
            "questions": _questions(renderer, eval_rows.spool.view(np.unique(evaluated))),
            "resolved": settled,
            "specimens": [row.values() for row in (*shown, *shown_too)],
        }
    write_manifest(room, parts=("train", "eval"), arrays=list(arrays), facts=facts)


def renderer_of(
    config: DataConfig, tokenizer: Any, stop_id: int | None, settled: dict[str, Any]
) -> Renderer:
    return Renderer(
        tokenizer,
        template=settled["template"],
        thinking=settled["thinking"],
        day=settled["day"],
        train_on=config.train_on,
        max_length=config.max_length,
        overlong=config.overlong,
        prompt_suffix=config.prompt_suffix,
        system=config.system,
        stop_id=stop_id,
    )


def _read(recipe: Recipe, training: Spool, held: Spool) -> tuple[Rows, Rows, list[str]]:
    faults = Faults()
    train_rows, notes = read(recipe.training, recipe, training, faults)
    eval_rows, said = read(recipe.held or (), recipe, held, faults)
    notes += [f"eval {line}" for line in said]
    faults.raise_any()
    if not len(train_rows):
        raise DataError("data.train: no rows in it; give a file that has some")
    if recipe.held is None and recipe.config.eval_fraction:
        train_rows, eval_rows, note = split(
            train_rows, recipe.config.eval_fraction, seed=recipe.seed
        )
        notes.append(note)
    return train_rows, eval_rows, notes


def _rendered(
    renderer: Renderer, rows: Rows, part: str, room: Path, ledger: LedgerWriter
) -> tuple[np.ndarray, list[Conversation]]:
    """Write the part's examples and its lines of the ledger.

    Gives each example's row by number, and specimens of the rows that were kept; of held-out ones
    too, for those are answered in text.
    """
    writer, index, shapes = ExamplesWriter(room, part), array("q"), Shapes(renderer.special_texts)
    times = rows.times if part == "train" else np.ones(len(rows), np.int64)
    passing = shapes.passing(rows.spool)
    for number, (source, outcome) in enumerate(renderer.render_stream(passing)):
        if isinstance(outcome, Dropped):
            ledger.drop(source, part, outcome.reason, times=int(times[number]))
            continue
        _note(ledger, source, part, outcome, int(times[number]), renderer.unknown_id)
        for example in outcome:
            writer.add(example)
            index.append(number)
    writer.finished()
    of_example = np.array(index, np.int64)
    most = MOST_SPECIMENS if part == "train" else MOST_SPECIMENS // 4
    chosen = shapes.chosen(np.unique(of_example), most=most)
    return of_example, [rows.spool[number] for number in chosen]


def _note(
    ledger: LedgerWriter,
    source: str,
    part: str,
    examples: Sequence[Example],
    times: int,
    unknown_id: int | None,
) -> None:
    """The ledger's line for a row that became these examples."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(example.ids.tobytes() + b"\0" + example.trained.tobytes())
    whole = sum(e.length_before_cut for e in examples)
    unknown = 0 if unknown_id is None else sum(int((e.ids == unknown_id).sum()) for e in examples)
    ledger.keep(
        source,
        part,
        digest.digest(),
        examples=len(examples),
        tokens=whole,
        trained_tokens=sum(int(np.count_nonzero(e.trained)) for e in examples),
        cut=whole - sum(len(e.ids) for e in examples),
        times=times,
        unknown=unknown,
    )


def _questions(renderer: Renderer, rows: Sequence[Conversation]) -> list[dict[str, Any]]:
    """The last answer of each held-out row that was kept whole up to it, with its prompt."""
    questions = []
    for row in rows:
        last = len(row.messages) - 1
        while last > 0 and row.messages[last].role != "assistant":
            last -= 1
        if row.kind == "text" or last <= 0:
            continue
        try:
            ids = renderer.prompt(row.messages[:last], tools=row.tools, kind=row.kind)
        except DataError:
            continue  # its turns are counted as dropped in the ledger
        if len(ids) < renderer.max_length:
            answer = row.messages[last].content
            questions.append({"prompt_ids": ids, "reference": answer, "source": row.source})
    return questions


def _leaks(ledger: LedgerRows) -> list[str]:
    held = ledger.of_part("eval")
    both = len(held.repeated_of_training)
    return [f"warning: {both:,} of {len(held):,} eval rows are also trained on"] if both else []
