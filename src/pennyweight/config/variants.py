"""The runs that `adapters:` describes: one description and what differs, entry by entry.

Each is an ordinary run with a name and a folder of its own. Everything wrong is found at once,
with the path of the value that is to blame, for whoever knows its line.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from pennyweight.config.document import Path, spell
from pennyweight.config.keys import GROUPS, KEYS, accepts, nearest_key
from pennyweight.config.rules import broken_rules, resolve
from pennyweight.config.schema import RunConfig
from pennyweight.errors import ConfigError

__all__ = ["variant_faults", "variants"]

MOST = 256
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
# What all share, and why.
_SHARED = {
    "base": "they share one resident base",
    "output_dir": "each goes to a folder of its name in output_dir",
    "compare": "only `compare` reads it",
    "adapters": "it cannot hold itself",
    "train.method": "they share one resident base",
}

Fault = tuple[Path, str]


@dataclass(frozen=True, slots=True)
class _Change:
    """One setting that differs, and where it was written."""

    key: str
    value: Any
    at: Path


def variants(run: RunConfig) -> dict[str, RunConfig]:
    """Every run that `adapters` describes, by name, in order; empty where it describes none.

    ConfigError names everything that is wrong.
    """
    found, faults = _read(run)
    if faults:
        raise ConfigError.all(message for _, message in faults)
    return found


def variant_faults(run: RunConfig) -> list[Fault]:
    """What is wrong with them: the path of the value, and the message."""
    return _read(run)[1]


def _read(run: RunConfig) -> tuple[dict[str, RunConfig], list[Fault]]:
    faults: list[Fault] = []
    found: dict[str, RunConfig] = {}
    for name, changes, at in _described(run, faults):
        if not _NAME.fullmatch(name):
            faults.append(
                (at, f"{spell(at)}: the name {name[:60]!r}; names start with a-z or 0-9 and go on "
                 "with a-z, 0-9, '.', '_' or '-', 64 characters at most")
            )  # fmt: skip
        elif name in found:
            faults.append((at, f"{spell(at)}: a second adapter named {name!r}; give each a name"))
        else:
            made = _made(run, name, changes, faults)
            found[name] = made or run
    return found, list(dict.fromkeys(faults))


def _described(run: RunConfig, faults: list[Fault]) -> Iterator[tuple[str, list[_Change], Path]]:
    """Name, changes and place of every adapter, list times grid."""
    entries: list[tuple[str, list[_Change], Path]] = []
    for i, entry in enumerate(run.adapters.list):
        at: Path = ("adapters", "list", i)
        if not isinstance(entry.get("name"), str):
            faults.append((at, f"{spell(at)}: needs a name, such as {{name: sql, adapter.r: 8}}"))
        else:
            changes = list(_changes({k: v for k, v in entry.items() if k != "name"}, at))
            entries.append((entry["name"], changes, at))
        continue
    axes = [
        [_Change(key, value, ("adapters", "grid", key, i)) for i, value in enumerate(values)]
        for key, values in run.adapters.grid.items()
    ]
    if len(entries or [0]) * _product(axes) > MOST:
        at = ("adapters", "grid") if axes else ("adapters", "list")
        count = len(entries or [0]) * _product(axes)
        faults.append((at, f"{spell(at)}: {count:,} adapters, {MOST} at most; try fewer values"))
        return
    for _, changes, _ in entries:
        faults += _key_faults(changes)
    faults += _key_faults([axis[0] for axis in axes])
    if faults or not (entries or axes):
        return
    for name, changes, at in entries or [("", [], ("adapters", "grid"))]:
        for point in itertools.product(*axes):
            parts = [name, *(_spelt(change) for change in point)]
            yield "_".join(part for part in parts if part), [*changes, *point], at


def _product(axes: list[list[_Change]]) -> int:
    count = 1
    for axis in axes:
        count *= len(axis)
    return count


def _changes(table: Mapping[str, Any], at: Path) -> Iterator[_Change]:
    """`{adapter.r: 8}` and `{adapter: {r: 8}}` are the same."""
    for key, value in table.items():
        if key in GROUPS and isinstance(value, dict):
            yield from (_Change(f"{key}.{k}", v, (*at, key, k)) for k, v in value.items())
        else:
            yield _Change(key, value, (*at, key))


def _key_faults(changes: list[_Change]) -> Iterator[Fault]:
    for change in changes:
        group = change.key.partition(".")[0]
        why = _SHARED.get(change.key) or _SHARED.get(group)
        if change.key not in KEYS and change.key not in GROUPS:
            meant = nearest_key(change.key)
            mend = f"did you mean {meant}?" if meant else f"groups: {', '.join(GROUPS)}"
            yield change.at, f"{_place(change)}: unknown key; {mend}"
        elif why is not None:
            yield change.at, f"{_place(change)}: is the same for all adapters: {why}; remove it"
        elif change.key in GROUPS:
            yield change.at, f"{_place(change)}: a group; name a setting in it"


def _place(change: _Change) -> str:
    return spell(change.at)


def _made(run: RunConfig, name: str, changes: list[_Change], faults: list[Fault]) -> Any:
    """The run of one adapter; None, and its faults, where it is none."""
    tree = run.model_dump(exclude_unset=True, exclude={"adapters"})
    for change in changes:
        group, _, setting = change.key.rpartition(".")
        (tree.setdefault(group, {}) if group else tree)[setting] = change.value
    tree["output_dir"] = str(FilePath(run.output_dir) / name)
    try:
        made = RunConfig.model_validate(tree)
    except ValidationError as error:
        wrong = {".".join(map(str, each["loc"][:2])) for each in error.errors()}
        wrong |= {str(each["loc"][0]) for each in error.errors()}
        for change in changes:
            if change.key in wrong:
                faults.append(
                    (change.at, f"{_place(change)}: found {change.value!r}, expected "
                     f"{accepts(KEYS[change.key])}")
                )  # fmt: skip
        return None
    broken = broken_rules(made)
    changed = {change.key: change for change in changes}
    for rule in broken:
        blamed = next((changed[key] for key in rule.keys if key in changed), None)
        at = blamed.at if blamed else ("adapters",)
        faults.append((at, f"{spell(at)}: {name}: {rule.keys[0]}: {rule.needs}"))
    return None if broken else resolve(made)


def _spelt(change: _Change) -> str:
    """A value as part of a name: `r-16`, `learning_rate-1e-4`, `train-sql`."""
    return f"{change.key.rpartition('.')[2]}-{_slug(change.value)}"


def _slug(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(_slug(each) for each in value).replace("+", ".")
    if isinstance(value, dict):
        return _slug(value.get("path", "-".join(map(str, value))))
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if isinstance(value, int | float):
        small = isinstance(value, float) and 0 < abs(value) < 1e-2
        text = f"{value:e}" if small else f"{value:g}"
        mantissa, _, power = text.partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(power)}" if power else mantissa
    return re.sub(r"[^a-z0-9._-]+", "-", FilePath(str(value)).stem.lower()).strip("-") or "value"
