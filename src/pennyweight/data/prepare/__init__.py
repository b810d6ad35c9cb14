"""A run's data: from its description to examples, with a ledger of every row, kept in a cache.

The cache key is the content of the files, the tokenizer, the template and every setting that shapes
ids; a run that finds its key reads memory-mapped arrays and no file of rows. One that does not
writes them as rows stream by: `reading` (sources to conversations), `making` (conversations to
examples), `identity` (what makes the key).
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

from pennyweight.config import DataConfig, Source
from pennyweight.data import dataset
from pennyweight.data.chat import Renderer
from pennyweight.data.conversation import Conversation
from pennyweight.data.examples import Examples, Stored, load_folder, put
from pennyweight.data.ledger import Ledger, LedgerRows
from pennyweight.data.limits import past_limits
from pennyweight.data.prepare.identity import key_of, made_of, refuse_changed, settings_of
from pennyweight.data.prepare.making import make, renderer_of
from pennyweight.data.prepare.recipe import Recipe
from pennyweight.data.specimens import Specimen, as_trained
from pennyweight.errors import DataError, DiskError
from pennyweight.files import scratch_folder

__all__ = ["Prepared", "Question", "located", "prepare"]


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out row to answer in text: its prompt as served, and the answer it was given."""

    prompt_ids: tuple[int, ...]
    reference: str
    source: str


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Everything a run needs of its data. `fingerprint`: sha256 of all that shaped it; `made_of`:
    the same part by part, the settings apart, as a reader should see it; `specimens`: rows of
    every shape, as they were read and as they are trained.
    """

    train: Examples
    eval: Examples
    questions: tuple[Question, ...]
    ledger: Ledger
    renderer: Renderer
    fingerprint: str
    specimens: tuple[Specimen, ...] = ()
    made_of: dict[str, str] = field(default_factory=dict)

    @property
    def eval_prompts(self) -> list[tuple[int, ...]]:
        return [question.prompt_ids for question in self.questions]

    @property
    def references(self) -> list[str]:
        return [question.reference for question in self.questions]


def prepare(
    config: DataConfig,
    tokenizer: Any,
    *,
    seed: int,
    stop_id: int | None = None,
    cache_dir: Path | None = None,
    limited: bool = True,
    day: str | None = None,
) -> Prepared:
    """Read, render, split and count; DataError names every fault, and each limit the data is past.

    `stop_id`: what ends a document where the template names nothing; default the tokenizer's EOS.
    `cache_dir`: default `$PENNYWEIGHT_CACHE`, else `~/.cache/pennyweight`. `limited` False gives
    data past its limits too, for a caller that shows it. `day`: what templates that print the date
    are told, as `2026-01-31`; default today.
    """
    training, held = located(config)
    recipe = Recipe(
        config,
        tokenizer,
        tuple(training),
        None if held is None else tuple(held),
        seed=seed if config.split_seed is None else config.split_seed,
        stop_id=stop_id,
        day=day or date.today().isoformat(),
    )
    prepared = _cached_or_made(recipe, cache_dir or _default_cache())
    if limited and (past := past_limits(prepared.ledger, config)):
        raise DataError.all(past)
    return prepared


def located(
    config: DataConfig,
) -> tuple[list[dataset.Located], list[dataset.Located] | None]:
    """The sources to train on and those to hold out, None where rows are set apart."""
    training = dataset.locate(config.train, config)
    held = None
    if config.eval is not None:
        held = dataset.locate(config.eval, config)
    elif config.eval_fraction and all(each.source.path == "builtin" for each in training):
        held = dataset.locate(Source(path="builtin", split="eval"), config)
    both = dataset.told_apart([*training, *(held or ())])
    return both[: len(training)], None if held is None else both[len(training) :]


def _cached_or_made(recipe: Recipe, cache: Path) -> Prepared:
    settings = settings_of(recipe)
    key = key_of(settings)
    folder, notes = cache / "data" / key, []
    stored = load_folder(folder)
    if stored is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with scratch_folder(folder.parent) as room:
                make(recipe, room)
                refuse_changed(settings, recipe)
                put(room, folder)
            stored = _read_back(folder)
        except OSError as error:
            notes = [f"the prepared data could not be cached in {folder.parent}: {error.strerror}"]
            # Mapped files outlive their names.
            with scratch_folder(Path(tempfile.gettempdir())) as room:
                make(recipe, room)
                refuse_changed(settings, recipe)
                stored = _read_back(room)
    prepared = _prepared(recipe, stored, key)
    ledger = replace(prepared.ledger, notes=(*prepared.ledger.notes, *notes))
    return replace(prepared, ledger=ledger, made_of=made_of(settings))


def _read_back(folder: Path) -> Stored:
    stored = load_folder(folder)
    if stored is None:
        raise DiskError(f"{folder}: gives back other bytes than were written; check the disk")
    return stored


def _prepared(recipe: Recipe, stored: Stored, key: str) -> Prepared:
    facts, parts = stored.facts, stored.parts
    chosen = [Conversation.of(values) for values in facts["specimens"]]
    return Prepared(
        train=parts["train"].subset(stored.arrays["repeated"]),
        eval=parts["eval"],
        questions=tuple(
            Question(tuple(q["prompt_ids"]), q["reference"], q["source"])
            for q in facts["questions"]
        ),
        ledger=Ledger(LedgerRows.of_arrays(stored.arrays), tuple(facts["notes"])),
        renderer=renderer_of(recipe.config, recipe.tokenizer, recipe.stop_id, facts["resolved"]),
        fingerprint=key,
        specimens=as_trained(chosen, parts["train"], parts["eval"]),
    )


def _default_cache() -> Path:
    named = os.environ.get("PENNYWEIGHT_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "pennyweight"
