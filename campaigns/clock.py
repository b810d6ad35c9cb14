"""Time as a campaign feels it: while this process stands still with all that it started (stopped, or
the machine asleep), none passes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import cache

__all__ = ["running_s", "until"]

LOOK_EVERY_S, STOOD_STILL_S = 0.02, 0.5


class _Clock:
    def __init__(self) -> None:
        self._lock, self._seen, self._still_s = threading.Lock(), time.monotonic(), 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def look(self) -> float:
        with self._lock:
            before, self._seen = self._seen, time.monotonic()
            if self._seen - before > STOOD_STILL_S:
                self._still_s += self._seen - before
            return self._seen - self._still_s

    def _run(self) -> None:
        while True:
            time.sleep(LOOK_EVERY_S)
            self.look()


@cache
def _clock() -> _Clock:
    return _Clock()


def running_s() -> float:
    """Seconds since some instant in which this process ran."""
    return _clock().look()


def until(happened: Callable[[], bool], longest_s: float, *, every_s: float = 0.02) -> bool:
    """Wait for it at most so long; whether it happened."""
    end = running_s() + longest_s
    while not happened():
        if running_s() > end:
            return False
        time.sleep(every_s)
    return True
