"""One account of a device's memory for all that draws on it: what is reserved fits, or is refused.

Generation reserves for keys and values, training for activations, a bank for adapters. An account
moves no bytes itself: each keeps to what it was given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from threading import Lock

from pennyweight.errors import ConfigError

__all__ = ["MemoryBudget"]


class MemoryBudget:
    """`total_bytes` to give out, to whoever asks first; several threads may ask.

    `floors`: what a purpose can always have; nobody else is given any of it. While a purpose is
    named in `waiting`, the others get nothing beyond their floors, so that whatever they give back
    comes to the one that waits.
    """

    def __init__(self, total_bytes: int, floors: Mapping[str, int] | None = None) -> None:
        if total_bytes < 1:
            raise ConfigError(f"a memory budget of {total_bytes} bytes: give it at least one")
        self.total_bytes = total_bytes
        self.floors: Mapping[str, int] = dict(floors or {})
        assert sum(self.floors.values()) <= total_bytes, (self.floors, total_bytes)
        self.waiting: str | None = None
        self._held: Counter[str] = Counter()
        self._lock = Lock()

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self._held.total()

    def free_for(self, purpose: str) -> int:
        """What this purpose could have now."""
        with self._lock:
            return self._free_for(purpose)

    def sure_bytes(self, purpose: str) -> int:
        """What this purpose can have sooner or later, whatever the others do."""
        return self.floors.get(purpose, self.total_bytes - sum(self.floors.values()))

    def is_beyond(self, purpose: str) -> bool:
        """Whether another waits for what this purpose holds beyond its floor."""
        others_wait = self.waiting not in (None, purpose)
        return others_wait and self._held[purpose] > self.floors.get(purpose, 0)

    def held(self) -> dict[str, int]:
        """Bytes reserved, by purpose."""
        with self._lock:
            return {purpose: held for purpose, held in self._held.items() if held}

    def reserve(self, purpose: str, wanted_bytes: int) -> bool:
        """Take these bytes; False, and nothing taken, where fewer are free for this purpose."""
        assert wanted_bytes >= 0, wanted_bytes
        with self._lock:
            if wanted_bytes > self._free_for(purpose):
                return False
            self._held[purpose] += wanted_bytes
            return True

    def release(self, purpose: str, freed_bytes: int) -> None:
        """Give back what this purpose holds, or part of it."""
        with self._lock:
            assert 0 <= freed_bytes <= self._held[purpose], (purpose, freed_bytes, self._held)
            self._held[purpose] -= freed_bytes

    def _free_for(self, purpose: str) -> int:
        kept = {name: max(0, floor - self._held[name]) for name, floor in self.floors.items()}
        own = kept.pop(purpose, 0)
        if self.waiting not in (None, purpose):
            return own
        return self.free_bytes - sum(kept.values())
