"""Progress as plain lines that read well in a terminal, a log file and a CI page."""

from __future__ import annotations

import math

__all__ = ["Pace", "duration", "progress_line"]

_WINDOW = 20


class Pace:
    """Speed over the last few steps, so that a slow start is soon forgotten."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, float]] = []

    def add(self, *, tokens: int, seconds: float) -> None:
        self._steps = [*self._steps[1 - _WINDOW :], (tokens, seconds)]

    @property
    def tokens_per_second(self) -> float:
        seconds = sum(took for _, took in self._steps)
        return sum(tokens for tokens, _ in self._steps) / seconds if seconds > 0 else math.nan

    @property
    def seconds_a_step(self) -> float:
        return sum(took for _, took in self._steps) / max(1, len(self._steps))


def progress_line(
    number: int,
    total: int,
    *,
    loss: float,
    learning_rate: float,
    tokens_per_second: float,
    eta_seconds: float,
) -> str:
    """`step  120/400   30%  loss 1.2345  lr 1.50e-04  1,234 tok/s  eta 1:23`; loss in nats."""
    width = len(str(total))
    return (
        f"step {number:>{width}}/{total}  {number / total:4.0%}  loss {loss:.4f}  "
        f"lr {learning_rate:.2e}  {tokens_per_second:,.0f} tok/s  eta {duration(eta_seconds)}"
    )


def duration(seconds: float) -> str:
    """`0:07`, `12:03`, `1:02:03`, `2d 3:04:05`."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
