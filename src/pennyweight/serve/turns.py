"""Whose turn it is: deficit round robin (Shreedhar and Varghese 1995) with tokens for bytes.

What a piece of work costs is known once it is done, so a lane may go into debt and is passed over
until its shares have paid for it. While two lanes have work, the tokens they get stand in the ratio
of their weights, to within one piece of work of each; a lane without work saves nothing up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

__all__ = ["QUANTUM_TOKENS", "Lane", "Turns"]

QUANTUM_TOKENS = 64.0


@runtime_checkable
class Lane(Protocol):
    """Something that has work for the device, in pieces."""

    weight: float

    @property
    def busy(self) -> bool: ...


class Turns:
    """What each lane has in hand, in tokens, and whose turn it is."""

    def __init__(self) -> None:
        self._credit: dict[int, float] = {}
        self._last: Lane | None = None

    def next(self, lanes: Sequence[Lane]) -> Lane | None:
        """The lane to work now; None where none has work."""
        known = self._credit
        self._credit = {id(lane): known.get(id(lane), 0.0) for lane in lanes}
        for lane in lanes:
            if not lane.busy:
                self._credit[id(lane)] = min(self._credit[id(lane)], 0.0)
        after = lanes.index(self._last) + 1 if self._last in lanes else 0
        busy = [lane for lane in (*lanes[after:], *lanes[:after]) if lane.busy]
        if not busy:
            return None
        if all(self._credit[id(lane)] <= 0 for lane in busy):
            # As many rounds as it takes until one of them is out of debt.
            rounds = min(self._rounds(lane) for lane in busy)
            for lane in busy:
                self._credit[id(lane)] += rounds * QUANTUM_TOKENS * lane.weight
        able = [lane for lane in busy if self._credit[id(lane)] > 0]
        # The same lane goes on until its share is used up, then the next one.
        self._last = self._last if self._last in able else able[0]
        return self._last

    def charge(self, lane: Lane, tokens: float) -> None:
        """After a piece of work; everything costs something."""
        self._credit[id(lane)] = self._credit.get(id(lane), 0.0) - max(1.0, tokens)

    def _rounds(self, lane: Lane) -> int:
        return 1 + math.floor(-self._credit[id(lane)] / (QUANTUM_TOKENS * lane.weight))
