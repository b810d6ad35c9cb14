"""What data are made of: a description whose files are at hand, and all that rendering needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pennyweight.config import DataConfig
from pennyweight.data import dataset

__all__ = ["Recipe"]


@dataclass(frozen=True, slots=True, eq=False)
class Recipe:
    """`held` is None where rows are set apart by `seed`; `day` is what dated templates are told."""

    config: DataConfig
    tokenizer: Any
    training: tuple[dataset.Located, ...]
    held: tuple[dataset.Located, ...] | None
    seed: int
    stop_id: int | None
    day: str
