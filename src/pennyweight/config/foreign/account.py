"""The account of a translation: what became of every key of another tool's file, and what was wrong.

Values are read as the other tool's YAML 1.1 reader and type checks would take them: `yes` is true
and `"2e-4"` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pennyweight.config.document import Path, spell

__all__ = ["Account", "Entry", "Fate"]

_TRUTHS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
_SECRET = re.compile(r"(hub_token|api_key|secret|password|webhook_url)$")
_SHOWN = 60


class Fate(StrEnum):
    """What became of one key."""

    CARRIED = "carried"
    ASSUMED = "its default there"
    SAME = "the same here"
    UNNEEDED = "not needed here"
    LOST = "NOT carried"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Entry:
    """`to`: the setting it became, with the value it has there in `becomes` where that is its own.
    `line` is None for what the file leaves out."""

    key: str
    line: int | None
    value: str
    fate: Fate
    to: str
    becomes: str
    said: str


@dataclass
class _Kept:
    """What all parts of one file share."""

    name: str
    lines: Mapping[Path, int]
    run: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    faults: list[tuple[int, str]] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


class Account:
    """One table of the file, the whole or a part of it; every key is open until told what became of it.

    `run` collects settings (`train.learning_rate`), `files` texts to be written beside the YAML.
    """

    def __init__(self, kept: _Kept, tool: str, tree: Mapping[str, Any], path: Path = ()) -> None:
        self.tool, self.path = tool, path
        self._tree, self._kept, self._open = tree, kept, dict.fromkeys(tree)

    @classmethod
    def of_file(
        cls, name: str, tool: str, tree: Mapping[str, Any], lines: Mapping[Path, int]
    ) -> Account:
        return cls(_Kept(name, lines), tool, tree)

    @property
    def run(self) -> dict[str, Any]:
        return self._kept.run

    @property
    def origins(self) -> dict[str, str]:
        """Where each setting came from: `axolotl.yml:12 micro_batch_size`."""
        return self._kept.origins

    @property
    def entries(self) -> list[Entry]:
        return self._kept.entries

    @property
    def differences(self) -> list[str]:
        return self._kept.differences

    @property
    def files(self) -> dict[str, str]:
        return self._kept.files

    @property
    def faults(self) -> list[str]:
        return [message for _, message in sorted(self._kept.faults, key=lambda it: it[0])]

    # Reading. None is what the other tools take for «not given».

    def __contains__(self, key: str) -> bool:
        return self._tree.get(key) is not None

    def read(self, key: str) -> Any:
        return self._tree.get(key)

    def number(self, key: str) -> float | None:
        value = self._tree.get(key)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return self._wrong(key, "a number")
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return value
        return self._wrong(key, "a number")

    def whole(self, key: str) -> int | None:
        value = self.number(key)
        if value is not None and int(value) != value:
            return self._wrong(key, "a whole number")
        return None if value is None else int(value)

    def truth(self, key: str) -> bool | None:
        value = self._tree.get(key)
        if isinstance(value, str):
            value = _TRUTHS.get(value.lower(), value)
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        return value if value is None else self._wrong(key, "true or false")

    def text(self, key: str) -> str | None:
        value = self._tree.get(key)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        return self._wrong(key, "text")

    def words(self, key: str) -> list[str] | None:
        """A list of texts, or one text with commas between them."""
        value = self._tree.get(key)
        if isinstance(value, str):
            return [word.strip() for word in value.split(",") if word.strip()]
        if value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            return value
        return self._wrong(key, "a list of names")

    def table(self, key: str) -> dict[str, Any] | None:
        """A table that is carried as it is."""
        value = self._tree.get(key)
        return value if value is None or isinstance(value, dict) else self._wrong(key, "a table")

    def part(self, key: str) -> Account | None:
        """The table under a key, as an account of its own."""
        value = self._tree.get(key)
        if value == {}:
            return None
        if isinstance(value, dict):
            self._close(key)
            return Account(self._kept, self.tool, value, (*self.path, key))
        return None if value is None else self._wrong(key, "a table")

    def parts(self, key: str) -> list[Account]:
        """The tables of a list."""
        value = self._tree.get(key)
        if value is None or value == []:
            return []
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            self._wrong(key, "a list of tables")
            return []
        self._close(key)
        return [
            Account(self._kept, self.tool, each, (*self.path, key, i))
            for i, each in enumerate(value)
        ]

    # Telling what became of a key. One may be told several times: it became several settings.

    def carry(self, key: str, to: str, value: Any, said: str = "") -> None:
        """The key became the setting `to`."""
        self.run[to] = value
        self.origins[to] = f"{self._place(key)} {spell((*self.path, key))}"
        self._tell(key, Fate.CARRIED, said, to, _in_short(value))

    def became(self, key: str, to: str, said: str = "") -> None:
        """The key became part of the setting `to`, which is written elsewhere."""
        self.origins.setdefault(to, f"{self._place(key)} {spell((*self.path, key))}")
        self._tell(key, Fate.CARRIED, said, to)

    def assume(self, key: str, to: str, value: Any, said: str = "") -> None:
        """The file leaves the key out, and its default there is not ours."""
        self.run[to] = value
        self.origins[to] = f"{self.tool}'s default of {spell((*self.path, key))}"
        spelt = spell((*self.path, key))
        self.entries.append(Entry(spelt, None, "", Fate.ASSUMED, to, _in_short(value), said))

    def carry_or_assume(
        self, key: str, to: str, value: Any, default: Any, *, said: str = "", assumed: str = ""
    ) -> None:
        """`value` where the file gives one, else `default`, which is the other tool's."""
        if value is not None:
            self.carry(key, to, value, said)
        elif key not in self:
            self.assume(key, to, default, assumed)

    def same(self, key: str, said: str = "") -> None:
        self._tell(key, Fate.SAME, said)

    def unneeded(self, key: str, why: str) -> None:
        self._tell(key, Fate.UNNEEDED, why)

    def idle(self, why: str, *keys: str) -> None:
        """Those of these keys that are given did nothing there either."""
        for key in keys:
            if key in self and key in self._open:
                self.unneeded(key, why)

    def lose(self, key: str, said: str) -> None:
        """What it would have done, and what to do."""
        self._tell(key, Fate.LOST, said)

    def unknown(self, key: str, said: str) -> None:
        self._tell(key, Fate.UNKNOWN, said)

    def differ(self, said: str) -> None:
        """An effective difference that no single key stands for."""
        self.differences.append(said)

    def open_keys(self) -> Iterator[str]:
        """Keys that nothing was told of yet, in the file's order."""
        return iter(list(self._open))

    def fault(self, key: str, message: str) -> None:
        """What makes a translation impossible; all faults are raised together."""
        line = self._line(key) or 0
        place = f"{self._place(key)}: " if line else f"{self._kept.name}: "
        self._kept.faults.append((line, f"{place}{spell((*self.path, key))}: {message}"))
        self._close(key)

    def _tell(self, key: str, fate: Fate, said: str, to: str = "", becomes: str = "") -> None:
        spelt = spell((*self.path, key))
        entry = Entry(spelt, self._line(key), self._shown(key), fate, to, becomes, said)
        self.entries.append(entry)
        self._close(key)

    def _close(self, key: str) -> None:
        self._open.pop(key, None)

    def _line(self, key: str) -> int | None:
        return self._kept.lines.get((*self.path, key))

    def _place(self, key: str) -> str:
        line = self._line(key)
        return f"{self._kept.name}:{line}" if line else self._kept.name

    def _shown(self, key: str) -> str:
        """The value in short; a secret is not repeated anywhere."""
        value = self._tree.get(key)
        if _SECRET.search(key) and value:
            return "…"
        shown = _in_short(value)
        return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 1] + "…"

    def _wrong(self, key: str, wanted: str) -> Any:
        """Notes the fault; gives None, as if the key were not given."""
        self.fault(key, f"found {_in_short(self._tree[key])[:_SHOWN]!r}, expected {wanted}")


def _in_short(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_in_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(_in_short(each) for each in value) + "]"
    return " ".join(str(value).split())
