"""What a run adds up over all its processes; every checkpoint holds it, the receipt is written from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pennyweight.evaluate import LossReport

__all__ = ["Tally"]


@dataclass(slots=True)
class Tally:
    """Seconds and tokens of all steps, the highest peak of memory, the steps after which the run was
    taken up again, and the bare base on the held-out rows."""

    seconds: float = 0.0
    tokens: int = 0
    peak_bytes: int | None = None
    resumed_after: list[int] = field(default_factory=list)
    before: LossReport | None = None

    def add(self, *, seconds: float, tokens: int) -> None:
        self.seconds += seconds
        self.tokens += tokens

    def saw(self, peak_bytes: int | None) -> None:
        """Take note of this process's high-water mark; an earlier process may have stood higher."""
        known = [peak for peak in (self.peak_bytes, peak_bytes) if peak is not None]
        self.peak_bytes = max(known, default=None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Tally:
        """The inverse of `to_dict`, also after JSON made lists of its tuples."""
        before = saved["before"]
        if before is not None:
            fields = ((k, tuple(v) if isinstance(v, list) else v) for k, v in before.items())
            before = LossReport(**dict(fields))
        return cls(**{**saved, "before": before})
