"""What a comparison of token ids came to: a table of ways and checks, and every fault in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pennyweight.errors import ConfigError, DataError

__all__ = ["CHECKS", "Check", "Fault", "Parity"]

Check = Literal["same ids", "one BOS", "stop token", "special text"]
CHECKS: tuple[Check, ...] = get_args(Check)
"""`same ids`: the prompt of each answer, to the token, and its text. `one BOS`: where the tokenizer
wants one. `stop token`: trained, and stopped on. `special text`: rows whose text holds one."""


@dataclass(frozen=True, slots=True)
class Fault:
    """The first row in which a way fails a check, and in how many rows it does.

    `position` is the first token that differs; `trained` and `found` are the tokens around it.
    """

    way: str
    check: Check
    source: str
    what: str
    mend: str
    rows: int = 1
    position: int | None = None
    trained: tuple[str, ...] = ()
    found: tuple[str, ...] = ()
    in_data: bool = False

    def __str__(self) -> str:
        also = f" (and {self.rows - 1} more rows)" if self.rows > 1 else ""
        lines = [f"token parity: {self.way}: {self.source}{also}: {self.what}"]
        for name, tokens in (("trained", self.trained), ("found", self.found)):
            lines += [f"  {name:7}  {' '.join(tokens)}"] if tokens else []
        return "\n".join([*lines, f"  {self.mend}"])


@dataclass(frozen=True, slots=True)
class Parity:
    """Rows by name and shape; for each way and check whether it holds (None: it does not apply)."""

    rows: Mapping[str, tuple[str, ...]]
    answers: int
    ways: Mapping[str, Mapping[Check, bool | None]]
    faults: tuple[Fault, ...]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def exit_code(self) -> int:
        """0; 65 where only the rows are at fault; else 2."""
        return 0 if self.ok else self._error().exit_code

    def refuse(self) -> None:
        """Raise what `exit_code` stands for, naming every fault; nothing where there is none."""
        if self.faults:
            raise self._error().all(str(fault) for fault in self.faults)

    def sentence(self) -> str:
        """One line for the log of a run."""
        return (
            f"token parity: {self.answers} answers in {len(self.rows)} rows of every shape, "
            f"{len(self.ways)} ways, the same ids"
            if self.ok
            else f"token parity: {len(self.faults)} faults"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "rows": {source: list(shape) for source, shape in self.rows.items()},
            "answers": self.answers,
            "ways": {way: dict(held) for way, held in self.ways.items()},
            "faults": [
                {name: getattr(fault, name) for name in Fault.__slots__} for fault in self.faults
            ],
            "notes": list(self.notes),
        }

    def _error(self) -> type[ConfigError] | type[DataError]:
        return DataError if all(fault.in_data for fault in self.faults) else ConfigError
