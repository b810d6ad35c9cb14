"""One family of errors, each with the exit code the command line returns for it.

    PennyweightError            1   something inside went wrong
    ├── ConfigError             2   the run's description or the command line (also a ValueError)
    ├── ModelError              2   a base model that cannot be read as asked (also a ValueError)
    ├── AdapterError            2   an adapter that does not bind, or is not one (also a ValueError)
    ├── DataError              65   rows that cannot be read or would train nothing (also a ValueError)
    ├── DivergedError           5   the loss or a gradient is not finite
    ├── MemoryExhausted         6   it does not fit, also after halving
    ├── DiskError              74   a file could not be written or is not what was written
    ├── Interrupted            75   stopped by a signal; durable and resumable
    └── Aborted               130   stopped at once by a second signal

A message says what was found, where, and the mend. Faults are collected and raised once:
`raise ConfigError.all(faults)` joins them one a line.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "Aborted",
    "AdapterError",
    "ConfigError",
    "DataError",
    "DiskError",
    "DivergedError",
    "Interrupted",
    "MemoryExhausted",
    "ModelError",
    "PennyweightError",
]


class PennyweightError(Exception):
    """Root of the family; `exit_code` is what the process returns."""

    exit_code = 1

    @classmethod
    def all(cls, faults: Iterable[str]) -> PennyweightError:
        """One error that names every fault, one a line."""
        return cls("\n".join(faults))


class ConfigError(PennyweightError, ValueError):
    exit_code = 2


class ModelError(PennyweightError, ValueError):
    exit_code = 2


class AdapterError(PennyweightError, ValueError):
    exit_code = 2


class DataError(PennyweightError, ValueError):
    exit_code = 65


class DivergedError(PennyweightError):
    exit_code = 5


class MemoryExhausted(PennyweightError):
    exit_code = 6


class DiskError(PennyweightError):
    exit_code = 74


class Interrupted(PennyweightError):
    exit_code = 75


class Aborted(PennyweightError):
    exit_code = 130
