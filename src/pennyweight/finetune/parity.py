"""Token parity before a run: the rows it would train, asked in every way, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pennyweight.config import load_run, resolve
from pennyweight.data.prepare import Prepared, prepare
from pennyweight.errors import ConfigError
from pennyweight.model import find_folder, load_tokenizer, stop_ids
from pennyweight.runs.asking import Asking
from pennyweight.runs.parity import Parity, Way, compared, prepared_ways
from pennyweight.runs.parity.run import (
    NO_LIMIT,
    as_it_would_be_merged,
    as_opened,
    of_another_day,
    parity_of_run,
)

__all__ = ["parity", "parity_of"]

_TRAINED = (
    "the prepared data is not what this rendering gives: empty $PENNYWEIGHT_CACHE and run again"
)
_ASKED = "chat, evaluation and server render with `data.template`: set another, or report this row"


def parity(
    target: Path | str, overrides: Sequence[str] = (), *, merged: Path | str | None = None
) -> Parity:
    """Hold every way to ask against what a run trained (its folder), or would train (its YAML file).

    `merged`: a merged folder to hold against it too. No weight is read. ConfigError, DataError.
    """
    if Path(target).is_dir():
        if overrides:
            raise ConfigError(
                f"{target}: a run's folder is as it was trained; leave {overrides[0]} out"
            )
        return parity_of_run(target, merged=merged)
    config = resolve(load_run(target, overrides).config)
    tokenizer = load_tokenizer(config.base.model)
    ends = stop_ids(config.base.model, tokenizer)
    data = prepare(config.data, tokenizer, seed=config.seed, stop_id=ends[0] if ends else None)
    model = config.base.model
    return parity_of(data, tokenizer, model=model, model_stop_ids=ends, merged=merged)


def parity_of(
    data: Prepared,
    tokenizer: Any,
    *,
    model: str,
    model_stop_ids: Sequence[int],
    merged: Path | str | None = None,
) -> Parity:
    """The same for data that is prepared, and a model by its name."""
    asking = Asking(data.renderer, model, tuple(model_stop_ids), NO_LIMIT)
    ways: list[Way] = [*prepared_ways(asking, data.questions, mend=_ASKED)]
    other_day = of_another_day(data.renderer)
    if other_day is None and merged is not None:
        ways.append(as_opened("merged folder", Path(merged), data.renderer))
    elif other_day is None:
        base = find_folder(model, weights=False)
        ways.append(as_it_would_be_merged(data.renderer, tokenizer, base))
    found = compared(data.specimens, data.renderer, ways, mend=_TRAINED)
    return replace(found, notes=(*([other_day] if other_day else ()), *found.notes))
