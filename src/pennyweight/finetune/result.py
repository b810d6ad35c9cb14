"""What a run came to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["RunResult"]


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to. Losses in nats per trained token of the held-out rows, None without any."""

    output_dir: str
    steps: int
    best_step: int
    trained_tokens: int
    train_seconds: float
    seconds_to_first_step: float
    loss_before: float | None
    loss_after: float | None
    loss_change: dict[str, Any] | None
    peak_memory_bytes: int | None
    planned_peak_bytes: int
    trained_parameters: int
    resumed_from: int | None
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}
