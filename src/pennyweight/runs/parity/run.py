"""Token parity of a finished run, from its folder and the folders that were made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from pennyweight.config import RunConfig
from pennyweight.data.chat import Conversation, Renderer
from pennyweight.errors import ConfigError, DataError
from pennyweight.model import find_folder, load_tokenizer, stop_ids
from pennyweight.runs.asking import Asking
from pennyweight.runs.dressing import EXPORTED
from pennyweight.runs.folder import RunFolder
from pennyweight.runs.parity.compare import compared
from pennyweight.runs.parity.outcome import Parity
from pennyweight.runs.parity.ways import (
    Way,
    WayRefusedError,
    generation_eos,
    prepared_ways,
    through_transformers,
)

__all__ = [
    "NO_LIMIT",
    "as_it_would_be_merged",
    "as_opened",
    "of_another_day",
    "parity_of_run",
]

NO_LIMIT = 2**31


def parity_of_run(folder: Path | str, *, merged: Path | str | None = None) -> Parity:
    """What was trained against chat, server, evaluation, the adapter's folder and a merged one.

    `merged`: default the run's own `merged`, where there is one; without any, the template that a
    merge would write. Reads no weight. ConfigError: no run, or one that kept no rows to compare.
    """
    run = RunFolder(Path(folder))
    config, held = run.config(), run.read_held_out()
    if not held.specimens:
        raise ConfigError(
            f"{run.path}: the run kept no rows to compare, an earlier version made it; give its "
            "YAML file, or train again"
        )
    full = config.train.method == "full" and run.model.is_dir()
    name = str(run.model) if full else config.base.model
    tokenizer = load_tokenizer(name)
    renderer = run.renderer(tokenizer, checked=False)
    asking = Asking(renderer, name, stop_ids(name, tokenizer), NO_LIMIT)
    ways: list[Way] = [*prepared_ways(asking, held.questions, mend=run.drift_mend)]
    if (other_day := of_another_day(renderer)) is None:
        ways += _folders(run, config, renderer, tokenizer, Path(merged) if merged else None)
    found = compared(held.specimens, renderer, ways, mend=run.drift_mend)
    return replace(found, notes=(*([other_day] if other_day else ()), *found.notes))


def of_another_day(renderer: Renderer) -> str | None:
    """Why transformers cannot be compared, where the template prints a date that is not today's."""
    day = renderer.settings["day"]
    if not renderer.reads_clock or day == date.today().isoformat():
        return None
    return (
        "the template prints the date, and transformers prints today's: only what tells it the day "
        f"of training, {day}, is compared"
    )


def _folders(
    run: RunFolder, config: RunConfig, renderer: Renderer, tokenizer: Any, merged: Path | None
) -> Iterator[Way]:
    """What others open: the adapter's folder as far as it speaks, and a folder of whole weights."""
    adapter = run.adapter
    if any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        yield as_opened("adapter folder", adapter, renderer, stops=frozenset(renderer.stop_ids))
    elif (adapter / EXPORTED).is_file():
        yield through_transformers(
            "adapter folder",
            tokenizer,
            renderer,
            template=(adapter / EXPORTED).read_text(encoding="utf-8"),
            stop_ids=frozenset(renderer.stop_ids),
            mend=f"{adapter / EXPORTED} is not what the run wrote: delete it, or train again",
        )
    if config.train.method == "full" and run.model.is_dir():
        yield as_opened("model folder", run.model, renderer)
    if merged is None and (run.path / "merged").is_dir():
        merged = run.path / "merged"
    if merged is not None:
        yield as_opened("merged folder", merged, renderer)
    elif config.train.method != "full":
        base = find_folder(config.base.model, weights=False)
        yield as_it_would_be_merged(renderer, tokenizer, base)


def as_opened(
    name: str, folder: Path, renderer: Renderer, stops: frozenset[int] | None = None
) -> Way:
    """As transformers asks with what stands in a folder; within bounds first, for who wrote it?"""
    tokenizer = load_tokenizer(str(folder))
    mend = (
        f"{folder} is not what the run trained: merge again, or do not serve with its template"
        if stops is None
        else f"delete the tokenizer files in {folder}, or put those of the base there"
    )
    bounded = None
    if getattr(tokenizer, "chat_template", None):
        try:
            bounded = Renderer(tokenizer, template="tokenizer", stop_id=renderer.stop_ids[0])
        except DataError as refused:
            return _refusing(name, str(refused), mend)
    return through_transformers(
        name,
        tokenizer,
        renderer,
        stop_ids=generation_eos(folder) if stops is None else stops,
        mend=mend,
        bounded=bounded,
    )


def _refusing(name: str, why: str, mend: str) -> Way:
    def prompt(row: Conversation, place: int) -> Sequence[int] | None:
        raise WayRefusedError(why)

    return Way(name, prompt, frozenset(), lambda ids: "", mend)


def as_it_would_be_merged(renderer: Renderer, tokenizer: Any, base: Path) -> Way:
    """The template and the stop tokens that a merge will write."""
    return through_transformers(
        "transformers",
        tokenizer,
        renderer,
        template=renderer.exported_template(),
        stop_ids=generation_eos(base) | set(renderer.stop_ids),
        mend="transformers alone would ask with other ids; set another data.template",
    )
