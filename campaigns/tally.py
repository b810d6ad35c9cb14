"""The count of one campaign: cases tried, cases survived, what went wrong in the others."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Absent", "Enough", "Tally"]

SAY_EVERY_S = 5.0


class Absent(Exception):
    """What a campaign needs is not on this machine; the text says what and how to have it."""


class Enough(Exception):
    """The time that was given is used up; what was tried so far counts."""


@dataclass
class Tally:
    """`longest_s`: after so many seconds a case is the last. `folder` is a scratch folder of the campaign's own. Progress goes to stderr."""

    name: str
    folder: Path
    longest_s: float = math.inf
    tried: int = 0
    survived: int = 0
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    said: float = field(default_factory=time.monotonic)

    def case(self, label: str, fault: str | None) -> None:
        """Count one case; `fault` says what broke the promise, None that it was kept."""
        self.tried += 1
        if fault is None:
            self.survived += 1
        else:
            self.faults.append(f"{label}: {fault}")
            print(f"{self.name}: FAULT {label}: {fault}", file=sys.stderr, flush=True)
        if time.monotonic() - self.said > SAY_EVERY_S:
            self.said = time.monotonic()
            self.say(f"{self.survived:,} of {self.tried:,} so far, at {label}")
        if self.seconds > self.longest_s:
            raise Enough

    def say(self, text: str) -> None:
        print(f"{self.name}: {text}", file=sys.stderr, flush=True)

    def remark(self, text: str) -> None:
        """A figure worth a line under the table, such as the longest time seen."""
        self.remarks.append(text)
        self.say(text)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began
