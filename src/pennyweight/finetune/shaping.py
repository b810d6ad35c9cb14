"""The settings that shape what is learned: two runs that differ in one of them are two runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pennyweight.config import RunConfig
from pennyweight.data.limits import LIMITS

__all__ = ["shaping"]

# Settings that shape what is learned, or which step of it is best.
SHAPES_THE_RUN = ("base.", "adapter.", "data.", "train.", "seed", "evaluate.max_rows")
# Settings that may change between a run and its resumption: they do not touch what is learned.
FREE_TO_CHANGE = frozenset(
    {
        "train.logging_steps",
        "train.save_steps",
        "train.save_total_limit",
        "train.report_to",
        "base.device",
        "base.attention",
        *(f"data.{limit}" for limit in LIMITS),
    }
)


def shaping(config: RunConfig) -> dict[str, str]:
    """Those settings by their full names, each value written out."""
    return {
        key: repr(value)
        for key, value in _flat(config.model_dump(mode="json"))
        if key.startswith(SHAPES_THE_RUN) and key not in FREE_TO_CHANGE
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
