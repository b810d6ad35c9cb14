"""One account of a device's memory for all that draws on it: what is reserved fits, or is refused.

Generation reserves for keys and values, training for activations, a bank for adapters. An account
moves no bytes itself: each keeps to what it was given.
"""

from __future__ import annotations

from collections import Counter
from threading import Lock

from pennyweight.errors import ConfigError

__all__ = ["MemoryBudget"]


class MemoryBudget:
    """`total_bytes` to give out, to whoever asks first; several threads may ask."""

    def __init__(self, total_bytes: int) -> None:
        if total_bytes < 1:
            raise ConfigError(f"a memory budget of {total_bytes} bytes: give it at least one")
        self.total_bytes = total_bytes
        self._held: Counter[str] = Counter()
        self._lock = Lock()

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self._held.total()

    def held(self) -> dict[str, int]:
        """Bytes reserved, by purpose."""
        with self._lock:
            return {purpose: held for purpose, held in self._held.items() if held}

    def reserve(self, purpose: str, wanted_bytes: int) -> bool:
        """Take these bytes; False, and nothing taken, where fewer are free."""
        assert wanted_bytes >= 0, wanted_bytes
        with self._lock:
            if wanted_bytes > self.free_bytes:
                return False
            self._held[purpose] += wanted_bytes
            return True

    def release(self, purpose: str, freed_bytes: int) -> None:
        """Give back what this purpose holds, or part of it."""
        with self._lock:
            assert 0 <= freed_bytes <= self._held[purpose], (purpose, freed_bytes, self._held)
            self._held[purpose] -= freed_bytes
