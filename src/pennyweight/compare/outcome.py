"""What a comparison came to: one value for each base and arm, and everything that was left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pennyweight.compare.tally import Figure
from pennyweight.report import plain

__all__ = ["ArmOutcome", "BaseOutcome", "Comparison", "RangeCurve"]


@dataclass(frozen=True, slots=True)
class BaseOutcome:
    """The model before any tuning, held as `storage` says. Losses in nats a token."""

    storage: str
    loss: Figure
    general: Figure
    answers: Figure | None


@dataclass(frozen=True, slots=True)
class ArmOutcome:
    """One arm over its seeds. Losses in nats a token; `kept` is 1 for all that full fine-tuning
    gained, None without a full arm that gained something; `forgotten` against the arm's own base.

    `effective_rank` by module, largest possible value `rank`; None for full fine-tuning.
    """

    name: str
    label: str
    method: str
    rank: int | None
    storage: str
    seeds: tuple[int, ...]
    learning_rate: float
    rate_from: str
    loss: Figure
    kept: Figure | None
    general: Figure
    forgotten: Figure
    answers: Figure | None
    trained_parameters: int
    bytes: int
    peak_memory_bytes: int | None
    planned_peak_bytes: int
    tokens_per_second: float
    train_seconds: float
    steps: int
    trained_tokens: tuple[int, ...]
    effective_rank: Mapping[str, Figure] | None


@dataclass(frozen=True, slots=True)
class RangeCurve:
    """One arm's range test: loss on the rows set apart by learning rate, None where it diverged."""

    label: str
    steps: int
    rows: int
    before: float
    rates: tuple[float, ...]
    losses: tuple[float | None, ...]
    stable: tuple[bool, ...]
    chosen: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All of it. `left_out`: why an arm has no figures, by its label; `judged`: how answers were."""

    model: str
    output_dir: str
    seeds: tuple[int, ...]
    train_rows: int
    test_rows: int
    general_text: str
    general_documents: int
    bases: tuple[BaseOutcome, ...]
    arms: tuple[ArmOutcome, ...]
    ranges: tuple[RangeCurve, ...]
    left_out: Mapping[str, str]
    notices: tuple[str, ...]
    judged: str | None
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        told = plain(self)
        assert isinstance(told, dict)
        return told
