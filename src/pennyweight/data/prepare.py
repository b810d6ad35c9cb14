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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.config import DataConfig, Source
from pennyweight.data import dataset
from pennyweight.data.chat import Renderer
from pennyweight.data.conversation import Conversation, Dropped, Example
from pennyweight.data.examples import Examples, load_folder, save_folder
from pennyweight.data.ledger import Ledger, LedgerRow
from pennyweight.data.read import Faults
from pennyweight.errors import DataError

__all__ = ["Prepared", "Question", "prepare"]

_VERSION = 1  # of what the cache holds; raised when rendering changes
_ROWS_AT_ONCE = 2000


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out row to answer in text: its prompt as served, and the answer it was given."""

    prompt_ids: tuple[int, ...]
    reference: str
    source: str


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """Everything a run needs of its data. `fingerprint`: sha256 of all that shaped it."""

    train: Examples
    eval: Examples
    questions: tuple[Question, ...]
    ledger: Ledger
    renderer: Renderer
    fingerprint: str

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
) -> Prepared:
    """Read, render, split and count; DataError names every fault, or says why nothing would train.

    `stop_id`: what ends a document where the template names nothing; default the tokenizer's EOS.
    `cache_dir`: default `$PENNYWEIGHT_CACHE`, else `~/.cache/pennyweight`.
    """
    seed = seed if config.split_seed is None else config.split_seed
    training, held = _located(config)
    settings = {
        "version": _VERSION,
        "data": config.model_dump(mode="json", exclude={"train", "eval", "packing", "split_seed"}),
        "train": [_said(located) for located in training],
        "eval": None if held is None else [_said(located) for located in held],
        "tokenizer": _tokenizer_sha256(tokenizer),
        "stop_id": stop_id,
        "seed": seed,
        "surface": _surface_text(config, tokenizer),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = (cache_dir or _default_cache()) / "data" / key
    if (cached := load_folder(folder)) is not None:
        return _from_cache(*cached, config, tokenizer, stop_id, key)
    prepared, facts = _made(config, tokenizer, training, held, seed=seed, stop_id=stop_id, key=key)
    try:
        save_folder(folder, {"train": facts.pop("all"), "eval": prepared.eval}, facts)
    except OSError as error:
        note = f"the prepared data could not be cached in {folder.parent}: {error.strerror}"
        ledger = Ledger(prepared.ledger.rows, (*prepared.ledger.notes, note))
        return Prepared(
            prepared.train, prepared.eval, prepared.questions, ledger, prepared.renderer, key
        )
    return prepared


def _located(
    config: DataConfig,
) -> tuple[list[dataset.Located], list[dataset.Located] | None]:
    training = dataset.locate(config.train, config)
    if config.eval is not None:
        return training, dataset.locate(config.eval, config)
    if config.eval_fraction and all(located.source.path == "builtin" for located in training):
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
    else:
        notes += _leaks(train_rows, eval_rows)

    renderer = _renderer(config, tokenizer, stop_id, _resolved(config, tokenizer, train_rows))
    notes += renderer.describe()["notes"]
    train, train_ledger, index = _rendered(renderer, train_rows, times, "train")
    evaluated, eval_ledger, _ = _rendered(renderer, eval_rows, [1] * len(eval_rows), "eval")
    ledger = Ledger((*train_ledger, *eval_ledger), tuple(notes))
    _refuse_useless(train, ledger, config)
    questions = _questions(renderer, eval_rows, evaluated)
    repeated = np.repeat(np.arange(len(train)), [times[row] for row in index])
    prepared = Prepared(train.subset(repeated), evaluated, questions, ledger, renderer, key)
    facts = {
        "all": train,
        "repeated": repeated.tolist(),
        "ledger": [row.values() for row in ledger.rows],
        "notes": notes,
        "questions": [
            {"prompt_ids": q.prompt_ids, "reference": q.reference, "source": q.source}
            for q in questions
        ],
        "resolved": _resolved(config, tokenizer, train_rows),
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
    return Prepared(train, parts["eval"], questions, ledger, renderer, key)


def _read(
    sources: Sequence[dataset.Located], config: DataConfig, faults: Faults, *, seed: int
) -> tuple[list[Conversation], list[int], list[str]]:
    """Conversations, how often each is trained by its source's weight, and what was found."""
    rows: list[Conversation] = []
    times: list[int] = []
    notes = []
    for located in sources:
        found = dataset.read(located, config.columns, faults)
        source = located.source
        indices = dataset.weighted(
            len(found.conversations), source.weight, seed=seed, name=source.path
        )
        counts = Counter(indices)
        taken = [(c, counts[i]) for i, c in enumerate(found.conversations) if counts[i]]
        rows += [conversation for conversation, _ in taken]
        times += [count for _, count in taken]
        weight = "" if source.weight == 1 else f", weight {source.weight:g}: {len(indices):,}"
        found_by = "found" if located.format == "auto" else "named"
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
        train_on=config.train_on,
        max_length=config.max_length,
        overlong=config.overlong,
        prompt_suffix=config.prompt_suffix,
        system=config.system,
        stop_id=stop_id,
    )


def _rendered(
    renderer: Renderer, rows: Sequence[Conversation], times: Sequence[int], part: str
) -> tuple[Examples, list[LedgerRow], list[int]]:
    """Examples, the ledger of their rows, and for each example the row it came from."""
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
            whole = sum(e.length_before_cut for e in outcome)
            kept = sum(len(e.ids) for e in outcome)
            trained = sum(int(e.trained.sum()) for e in outcome)
            ledger.append(
                LedgerRow(source, part, len(outcome), whole, trained, whole - kept, count)
            )
            examples += outcome
            index += [number] * len(outcome)
    return Examples.of(examples), ledger, index


def _refuse_useless(train: Examples, ledger: Ledger, config: DataConfig) -> None:
    rows = ledger.part("train")
    summary = ledger.summary()
    if not len(train):
        reasons = [f"{n:,} rows: {why}" for why, n in summary["dropped_why"].items()]
        raise DataError.all([f"data.train: none of {len(rows):,} rows can be trained on", *reasons])
    if summary["cut_rows"] == summary["kept"]:
        longest = max(row.tokens for row in rows)
        raise DataError(
            f"data.max_length: every one of {summary['kept']:,} rows is longer than "
            f"{config.max_length} tokens, so no stop token would be trained; raise it (the longest "
            f"has {longest:,})"
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


def _leaks(train: Sequence[Conversation], held: Sequence[Conversation]) -> list[str]:
    known = {_text(row) for row in train}
    both = sum(_text(row) in known for row in held)
    return [f"warning: {both:,} of {len(held):,} eval rows are also trained on"] if both else []


def _text(row: Conversation) -> str:
    return "\0".join(f"{message.role}\0{message.content}" for message in row.messages)


def _said(located: dataset.Located) -> dict[str, Any]:
    return {
        "source": located.source.model_dump(mode="json"),
        "format": located.format,
        "sha256": dataset.content_sha256(located),
    }


def _surface_text(config: DataConfig, tokenizer: Any) -> str:
    """What a template file says, and the day where a template prints it."""
    template = config.template
    own = getattr(tokenizer, "chat_template", None)
    text = json.dumps(own) if template in {"auto", "tokenizer"} else ""
    if template not in {"auto", "tokenizer", "plain", "turns", "chatml"}:
        path = Path(template)
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if "strftime_now" in text:
        from datetime import date

        text += date.today().isoformat()
    return text


def _tokenizer_sha256(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(tokenizer)
    specials = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()})
    return hashlib.sha256((text + specials).encode()).hexdigest()


def _default_cache() -> Path:
    named = os.environ.get("PENNYWEIGHT_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "pennyweight"
