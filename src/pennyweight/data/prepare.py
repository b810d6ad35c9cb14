"""A run's data: from its description to examples, with a ledger of every row, kept in a cache.

The cache key is the content of the files, the tokenizer, the template and every setting that shapes
ids; a run that finds its key reads memory-mapped arrays and no file of rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.config import DataConfig, Source
from pennyweight.data import dataset
from pennyweight.data.chat import Renderer
from pennyweight.data.conversation import Conversation, Dropped, Example
from pennyweight.data.examples import Examples, load_folder, save_folder
from pennyweight.data.ledger import Ledger, LedgerRow
from pennyweight.data.limits import LIMITS, past_limits
from pennyweight.data.read import Faults
from pennyweight.data.specimens import MOST_SPECIMENS, Specimen, as_trained, specimens
from pennyweight.errors import DataError

__all__ = ["Prepared", "Question", "located", "prepare"]

_VERSION = 4  # of what the cache holds; raised when rendering changes
_ROWS_AT_ONCE = 2000
_SHAPES_NO_IDS = {"train", "eval", "packing", "split_seed", *LIMITS}


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
    prepared = _cached_or_made(
        config,
        tokenizer,
        seed=seed,
        stop_id=stop_id,
        cache=cache_dir or _default_cache(),
        day=day or date.today().isoformat(),
    )
    if limited and (past := past_limits(prepared.ledger, config)):
        raise DataError.all(past)
    return prepared


def _cached_or_made(
    config: DataConfig, tokenizer: Any, *, seed: int, stop_id: int | None, cache: Path, day: str
) -> Prepared:
    seed = seed if config.split_seed is None else config.split_seed
    training, held = located(config)
    settings: dict[str, Any] = {
        "version": _VERSION,
        "data": config.model_dump(mode="json", exclude=_SHAPES_NO_IDS),
        "train": [_said(source) for source in training],
        "eval": None if held is None else [_said(source) for source in held],
        "tokenizer": _tokenizer_sha256(tokenizer),
        "stop_id": stop_id,
        "seed": seed,
        "surface": _surface_text(config, tokenizer, day),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = cache / "data" / key
    made_of = _made_of(settings)
    if (cached := load_folder(folder)) is not None:
        found = _from_cache(*cached, config, tokenizer, stop_id, key)
        return replace(found, made_of=made_of)
    prepared, facts = _made(
        config, tokenizer, training, held, seed=seed, stop_id=stop_id, key=key, day=day
    )
    _refuse_changed(settings["train"], training)
    _refuse_changed(settings["eval"] or [], held or [])
    try:
        save_folder(folder, {"train": facts.pop("all"), "eval": prepared.eval}, facts)
    except OSError as error:
        note = f"the prepared data could not be cached in {folder.parent}: {error.strerror}"
        ledger = Ledger(prepared.ledger.rows, (*prepared.ledger.notes, note))
        prepared = replace(prepared, ledger=ledger)
    return replace(prepared, made_of=made_of)


def located(
    config: DataConfig,
) -> tuple[list[dataset.Located], list[dataset.Located] | None]:
    """The sources to train on and those to hold out, None where rows are set apart."""
    training = dataset.locate(config.train, config)
    if config.eval is not None:
        return training, dataset.locate(config.eval, config)
    if config.eval_fraction and all(each.source.path == "builtin" for each in training):
        return training, dataset.locate(Source(path="builtin", split="eval"), config)
    return training, None


def _made(
    config: DataConfig,
    tokenizer: Any,
    training: Sequence[dataset.Located],
    held: Sequence[dataset.Located] | None,
    *,
    seed: int,
    stop_id: int | None,
    key: str,
    day: str,
) -> tuple[Prepared, dict[str, Any]]:
    faults, notes = Faults(), []
    train_rows, times, said = _read(training, config, faults, seed=seed)
    notes += said
    eval_rows: list[Conversation] = []
    if held is not None:
        eval_rows, _, said = _read(held, config, faults, seed=seed)
        notes += [f"eval {line}" for line in said]
    faults.raise_any()
    if not train_rows:
        raise DataError("data.train: no rows in it; give a file that has some")
    if held is None and config.eval_fraction:
        kept, apart, by = dataset.hold_out(train_rows, config.eval_fraction, seed=seed)
        eval_rows = [train_rows[i] for i in apart]
        train_rows, times = [train_rows[i] for i in kept], [times[i] for i in kept]
        together = "no question" if by == "prompt" else "no row"
        notes.append(f"held out {len(apart):,} rows by hash; {together} is on both sides")

    resolved = _resolved(config, tokenizer, train_rows) | {"day": day}
    renderer = _renderer(config, tokenizer, stop_id, resolved)
    notes += renderer.describe()["notes"]
    seen: dict[bytes, str] = {}
    train, train_ledger, index = _rendered(renderer, train_rows, times, "train", seen)
    evaluated, eval_ledger, _ = _rendered(renderer, eval_rows, [1] * len(eval_rows), "eval", seen)
    notes += _leaks(train_ledger, eval_ledger)
    ledger = Ledger((*train_ledger, *eval_ledger), tuple(notes))
    questions = _questions(renderer, eval_rows, evaluated)
    chosen = _chosen(renderer, train_rows, train, eval_rows, evaluated)
    repeated = np.repeat(np.arange(len(train)), [times[row] for row in index])
    prepared = Prepared(
        train.subset(repeated),
        evaluated,
        questions,
        ledger,
        renderer,
        key,
        as_trained(chosen, train, evaluated),
    )
    facts = {
        "all": train,
        "repeated": repeated.tolist(),
        "ledger": [row.values() for row in ledger.rows],
        "notes": notes,
        "questions": [
            {"prompt_ids": q.prompt_ids, "reference": q.reference, "source": q.source}
            for q in questions
        ],
        "resolved": resolved,
        "specimens": [row.values() for row in chosen],
    }
    return prepared, facts


def _from_cache(
    parts: dict[str, Examples],
    facts: dict[str, Any],
    config: DataConfig,
    tokenizer: Any,
    stop_id: int | None,
    key: str,
) -> Prepared:
    ledger = Ledger(tuple(LedgerRow(*row) for row in facts["ledger"]), tuple(facts["notes"]))
    questions = tuple(
        Question(tuple(q["prompt_ids"]), q["reference"], q["source"]) for q in facts["questions"]
    )
    renderer = _renderer(config, tokenizer, stop_id, facts["resolved"])
    train = parts["train"].subset(facts["repeated"])
    chosen = [Conversation.of(values) for values in facts["specimens"]]
    return Prepared(
        train,
        parts["eval"],
        questions,
        ledger,
        renderer,
        key,
        as_trained(chosen, parts["train"], parts["eval"]),
    )


def _chosen(
    renderer: Renderer,
    train_rows: Sequence[Conversation],
    train: Examples,
    eval_rows: Sequence[Conversation],
    evaluated: Examples,
) -> list[Conversation]:
    """Specimens of the rows that were kept, held-out ones too: those are answered in text."""
    special = renderer.special_texts
    kept = {source.split("#")[0] for part in (train, evaluated) for source in part.sources}
    trained = specimens([row for row in train_rows if row.source in kept], special)
    held = [row for row in eval_rows if row.source in kept]
    return trained + specimens(held, special, most=MOST_SPECIMENS // 4)


def _read(
    sources: Sequence[dataset.Located], config: DataConfig, faults: Faults, *, seed: int
) -> tuple[list[Conversation], list[int], list[str]]:
    """Conversations, how often each is trained by its source's weight, and what was found."""
    rows: list[Conversation] = []
    times: list[int] = []
    notes = []
    for place in sources:
        found = dataset.read(place, config.columns, faults)
        source = place.source
        indices = dataset.weighted(
            len(found.conversations), source.weight, seed=seed, name=source.path
        )
        counts = Counter(indices)
        taken = [(c, counts[i]) for i, c in enumerate(found.conversations) if counts[i]]
        rows += [conversation for conversation, _ in taken]
        times += [count for _, count in taken]
        weight = "" if source.weight == 1 else f", weight {source.weight:g}: {len(indices):,}"
        found_by = "found" if place.format == "auto" else "named"
        notes.append(
            f"{source.path}: {len(found.conversations):,} rows{weight}, "
            f"format {found.format} ({found_by})"
        )
    return rows, times, notes


def _resolved(config: DataConfig, tokenizer: Any, rows: Sequence[Conversation]) -> dict[str, Any]:
    """The template's name and whether answers carry reasoning, decided once for the run."""
    template = config.template
    if template == "auto" and not getattr(tokenizer, "chat_template", None):
        template = "turns" if any(row.kind == "chat" for row in rows) else "plain"
    answers = [m for row in rows for m in row.messages if m.role == "assistant"]
    reasoned = sum("reasoning_content" in m.extra for m in answers)
    return {"template": template, "thinking": reasoned * 2 > len(answers)}


def _renderer(
    config: DataConfig, tokenizer: Any, stop_id: int | None, resolved: dict[str, Any]
) -> Renderer:
    return Renderer(
        tokenizer,
        template=resolved["template"],
        thinking=resolved["thinking"],
        day=resolved["day"],
        train_on=config.train_on,
        max_length=config.max_length,
        overlong=config.overlong,
        prompt_suffix=config.prompt_suffix,
        system=config.system,
        stop_id=stop_id,
    )


def _rendered(
    renderer: Renderer,
    rows: Sequence[Conversation],
    times: Sequence[int],
    part: str,
    seen: dict[bytes, str],
) -> tuple[Examples, list[LedgerRow], list[int]]:
    """Examples, the ledger of their rows, and for each example the row it came from.

    `seen` holds the first row of each sequence of tokens, and is added to.
    """
    examples: list[Example] = []
    ledger: list[LedgerRow] = []
    index: list[int] = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        several = rows[start : start + _ROWS_AT_ONCE]
        for number, outcome in enumerate(renderer.render_many(several), start):
            source, count = rows[number].source, times[number]
            if isinstance(outcome, Dropped):
                ledger.append(LedgerRow(source, part, 0, 0, 0, 0, count, outcome.reason))
                continue
            ledger.append(_counted(outcome, source, part, count, renderer.unknown_id, seen))
            examples += outcome
            index += [number] * len(outcome)
    return Examples.of(examples), ledger, index


def _counted(
    examples: Sequence[Example],
    source: str,
    part: str,
    times: int,
    unknown_id: int | None,
    seen: dict[bytes, str],
) -> LedgerRow:
    """The ledger's line for a row that became these examples."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(example.ids.tobytes() + b"\0" + example.trained.tobytes())
    first = seen.setdefault(digest.digest(), source)
    whole = sum(e.length_before_cut for e in examples)
    unknown = 0 if unknown_id is None else sum(int((e.ids == unknown_id).sum()) for e in examples)
    return LedgerRow(
        source,
        part,
        len(examples),
        whole,
        sum(int(e.trained.sum()) for e in examples),
        whole - sum(len(e.ids) for e in examples),
        times,
        unknown=unknown,
        same_as=None if first == source else first,
    )


def _questions(
    renderer: Renderer, rows: Sequence[Conversation], examples: Examples
) -> tuple[Question, ...]:
    """The last answer of each held-out row that was kept whole up to it."""
    kept = {source.split("#")[0] for source in examples.sources}
    questions = []
    for row in rows:
        last = len(row.messages) - 1
        while last > 0 and row.messages[last].role != "assistant":
            last -= 1
        if row.kind == "text" or last <= 0 or row.source not in kept:
            continue
        try:
            ids = renderer.prompt(row.messages[:last], tools=row.tools, kind=row.kind)
        except DataError:
            continue  # its turns are counted as dropped in the ledger
        if len(ids) < renderer.max_length:
            questions.append(Question(tuple(ids), row.messages[last].content, row.source))
    return tuple(questions)


def _leaks(train: Sequence[LedgerRow], held: Sequence[LedgerRow]) -> list[str]:
    trained = {row.source for row in train}
    both = sum(row.same_as in trained for row in held)
    return [f"warning: {both:,} of {len(held):,} eval rows are also trained on"] if both else []


def _said(place: dataset.Located) -> dict[str, Any]:
    return {
        "source": place.source.model_dump(mode="json"),
        "format": place.format,
        "sha256": dataset.content_sha256(place),
    }


def _made_of(settings: dict[str, Any]) -> dict[str, str]:
    parts = {
        " ".join(filter(None, (part, said["source"]["path"], said["source"]["split"]))): said[
            "sha256"
        ]
        for part in ("train", "eval")
        for said in settings[part] or ()
    }
    rendering = json.dumps([settings[key] for key in ("version", "stop_id", "surface")])
    parts |= {"tokenizer": settings["tokenizer"]}
    parts |= {"rendering": hashlib.sha256(rendering.encode()).hexdigest()}
    return {name: digest[:16] for name, digest in parts.items()}


def _refuse_changed(said: list[dict[str, Any]], sources: Sequence[dataset.Located]) -> None:
    """What was read is what was hashed, or its name would stand for other rows."""
    for before, located in zip(said, sources, strict=True):
        if _said(located) != before:
            raise DataError(
                f"{located.source.path}: changed while it was read; run the same command again "
                "once nothing writes to it"
            )


def _surface_text(config: DataConfig, tokenizer: Any, day: str) -> str:
    """What a template file says, and the day where a template prints it."""
    template = config.template
    own = getattr(tokenizer, "chat_template", None)
    text = json.dumps(own) if template in {"auto", "tokenizer"} else ""
    if template not in {"auto", "tokenizer", "plain", "turns", "chatml"}:
        path = Path(template)
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if "strftime_now" in text:
        text += day
    return text


def _tokenizer_sha256(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(tokenizer)
    specials = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()})
    return hashlib.sha256((text + specials).encode()).hexdigest()


def _default_cache() -> Path:
    named = os.environ.get("PENNYWEIGHT_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "pennyweight"
