"""When a data set is refused: what it would do in silence, held against shares that are settings.

A single row never refuses a run; a share of 1 (of 0 for the trained tokens) turns a limit off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from pennyweight.config import DataConfig
from pennyweight.data.ledger import Ledger, LedgerRow, LedgerRows

__all__ = ["LIMITS", "past_limits"]

LIMITS = (
    "max_dropped_share",
    "max_cut_share",
    "max_duplicate_share",
    "max_leaked_share",
    "max_unknown_share",
    "min_trained_share",
)
"""The settings of `data` that shape nothing: they only decide whether a run begins."""

_WORST = 5


def past_limits(ledger: Ledger, config: DataConfig) -> list[str]:
    """What the data does that the settings do not allow, empty where all is well.

    Each finding is a line with its numbers and the setting's key, the worst rows, and the mend.
    """
    train = ledger.part("train")
    if not len(train.kept):
        reasons = [f"  {row_count(n)}: {why}" for why, n in _why(ledger, "train")]
        return [f"data.train: none of {len(train):,} rows can be trained on", *reasons]
    found = [
        *_dropped(ledger, "train", config),
        *_cut(train, config),
        *_repeated(train, config),
        *_unknown(train, config),
        *_hardly_trained(train, config),
    ]
    if config.eval is not None:
        found += _dropped(ledger, "eval", config)
    return [*found, *_leaked(ledger.part("eval"), config)]


def row_count(count: int) -> str:
    return f"{count:,} row" + ("" if count == 1 else "s")


def _dropped(ledger: Ledger, part: str, config: DataConfig) -> Iterator[str]:
    rows = ledger.part(part)
    gone = rows.dropped
    if not _too_many(len(gone), len(rows), config.max_dropped_share):
        return
    yield (
        f"data.max_dropped_share: {_of(len(gone), len(rows))} of data.{part} would be left out, "
        f"over {config.max_dropped_share:.2%}"
    )
    for why, count in _why(ledger, part):
        yield f"  {row_count(count)}: {why}"
    yield f"  such as {_named(gone)}"
    long = any("data.max_length" in (row.dropped or "") for row in gone)
    mend = "raise data.max_length" if long else "mend these rows or take them out"
    yield f"  {mend}; or raise data.max_dropped_share"


def _cut(train: LedgerRows, config: DataConfig) -> Iterator[str]:
    kept = train.kept
    short = kept.where(kept.column("cut") > 0)
    if not _too_many(len(short), len(kept), config.max_cut_share):
        return
    yield (
        f"data.max_cut_share: {_of(len(short), len(kept))} are longer than data.max_length "
        f"{config.max_length:,}, over {config.max_cut_share:.2%}; a row that is cut loses the end "
        "of its answer, and never trains the stop token"
    )
    worst = _worst(short, lambda row: row.cut)
    yield f"  the worst: {_named(worst, lambda r: f'{r.cut:,} of {r.tokens:,} tokens lost')}"
    yield (
        f"  raise data.max_length{_enough(kept, config)}, leave such rows out (data.overlong: "
        "drop), or split them; or raise data.max_cut_share"
    )


def _enough(kept: LedgerRows, config: DataConfig) -> str:
    """Which lengths would do, where each row is one example and its length is known."""
    sizes = kept.column("tokens")
    if (kept.column("examples") > 1).any():
        return ""
    enough = int(np.quantile(sizes, 1 - config.max_cut_share, method="higher"))
    return f" ({enough:,} is enough, {max(sizes):,} keeps every row whole)"


def _repeated(train: LedgerRows, config: DataConfig) -> Iterator[str]:
    kept = train.kept
    again = kept.repeated
    if not _too_many(len(again), len(kept), config.max_duplicate_share):
        return
    yield (
        f"data.max_duplicate_share: {_of(len(again), len(kept))} have the same tokens as an "
        f"earlier one, over {config.max_duplicate_share:.2%}"
    )
    often = Counter(row.same_as for row in again).most_common(_WORST)
    yield "  the worst: " + ", ".join(f"{source} ({n + 1:,} times)" for source, n in often)
    yield (
        "  keep one of each, and give what should weigh more a weight "
        "(data.train: {path: ..., weight: 2}); or raise data.max_duplicate_share"
    )


def _unknown(train: LedgerRows, config: DataConfig) -> Iterator[str]:
    kept = train.kept
    tokens, unknown = int(kept.column("tokens").sum()), int(kept.column("unknown").sum())
    if unknown <= 1 or unknown <= config.max_unknown_share * tokens:
        return
    yield (
        f"data.max_unknown_share: {unknown:,} of {tokens:,} tokens ({unknown / tokens:.2%}) stand "
        f"for text that the tokenizer has no token for, over {config.max_unknown_share:.2%}"
    )
    worst = _worst(kept.where(kept.column("unknown") > 0), lambda row: row.unknown)
    yield f"  the worst: {_named(worst, lambda r: f'{r.unknown:,} of {r.tokens:,} tokens')}"
    yield (
        "  choose a base.model whose tokenizer knows this script; or raise data.max_unknown_share"
    )


def _hardly_trained(train: LedgerRows, config: DataConfig) -> Iterator[str]:
    kept = train.kept
    tokens = int((kept.column("tokens") - kept.column("cut")).sum())
    trained = int(kept.column("trained_tokens").sum())
    if trained >= config.min_trained_share * tokens:
        return
    yield (
        f"data.min_trained_share: {trained:,} of {tokens:,} tokens ({trained / tokens:.3%}) are "
        f"trained, under {config.min_trained_share:.3%}"
    )
    least = sorted(kept, key=lambda r: r.trained_tokens / r.tokens)[:_WORST]
    yield f"  the worst: {_named(least, lambda r: f'{r.trained_tokens:,} of {r.tokens:,} tokens')}"
    yield (
        "  look at a row (pennyweight preview): are data.columns and data.train_on what you mean? "
        "Else lower data.min_trained_share"
    )


def _leaked(held: LedgerRows, config: DataConfig) -> Iterator[str]:
    kept = held.kept
    both = kept.repeated_of_training
    if not _too_many(len(both), len(kept), config.max_leaked_share):
        return
    yield (
        f"data.max_leaked_share: {_of(len(both), len(kept))} of data.eval are trained on too, over "
        f"{config.max_leaked_share:.2%}; what is measured on them is memory"
    )
    yield f"  such as {_named(both, lambda r: f'the same as {r.same_as}')}"
    yield "  take them out of data.train or of data.eval; or raise data.max_leaked_share"


def _too_many(count: int, of: int, share: float) -> bool:
    return count > 1 and count > share * of


def _why(ledger: Ledger, part: str) -> list[tuple[str, int]]:
    return list(ledger.summary(part)["dropped_why"].items())[:3]


def _of(count: int, of: int) -> str:
    return f"{count:,} of {of:,} rows ({count / of:.2%})"


def _worst(rows: Sequence[LedgerRow], badness: Callable[[LedgerRow], int]) -> list[LedgerRow]:
    return sorted(rows, key=badness, reverse=True)


def _named(rows: Sequence[LedgerRow], about: Callable[[LedgerRow], str] | None = None) -> str:
    """The first rows, by file and line."""
    said = [row.source + (f" ({about(row)})" if about else "") for row in rows[:_WORST]]
    more = len(rows) - len(said)
    return ", ".join(said) + (f" and {more:,} more" if more > 0 else "")
