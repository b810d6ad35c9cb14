"""A YAML file and a command line to a `RunConfig`, with the origin of every value.

Everything wrong is found in one reading and raised once, each fault with its line, what was found,
and the nearest key or the mend.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from pennyweight.config.document import Path, read_document, spell
from pennyweight.config.keys import GROUPS, KEYS, accepts, names_in, nearest_key
from pennyweight.config.rules import REPLACES, broken_rules, origins, resolve
from pennyweight.config.schema import RunConfig, Source
from pennyweight.config.variants import variant_faults
from pennyweight.errors import ConfigError

__all__ = ["LoadedRun", "load_run", "read_resolved"]

_MOST_BYTES = 4 * 2**20  # a file that never ends is read this far; read_document refuses it


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """`config` is resolved; `origin` says for each key `run.yaml:12`, `command line`, `default`, or
    the key it follows from; `text` is the file as it was read."""

    config: RunConfig
    origin: Mapping[str, str]
    text: str


def load_run(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedRun:
    """Read a run's description; `overrides` are of the form `train.learning_rate=1e-4`.

    Raises ConfigError with every fault, one a line.
    """
    text = _read_text(FilePath(path))
    found = _Findings(FilePath(path).name)
    tree = found.read_file(text)
    found.refuse_unknown(tree)
    for override in overrides:
        found.override(tree, override)
    found.refuse_unknown(tree)
    found.give_way(tree)
    run = found.validate(tree)
    if found.faults or run is None:
        raise ConfigError.all(found.said())
    origin = origins(run, {key: found.origin_of(key) for key in KEYS})
    return LoadedRun(resolve(run), origin, text)


def read_resolved(path: str | os.PathLike[str]) -> RunConfig:
    """The `config.json` of an output folder, where every value was written down by a run."""
    text = _read_text(FilePath(path))
    try:
        return RunConfig.model_validate_json(text)
    except ValidationError as error:
        faults = [f"{path}: {spell(e['loc'])}: {e['msg']}" for e in error.errors()]
        raise ConfigError.all([*faults, "it was written by another version, or changed"]) from None


def _read_text(path: FilePath) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        mend = "`pennyweight init --data my.jsonl > run.yaml` writes one"
        raise ConfigError(f"{path}: no such file; {mend}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a folder, where a run's YAML file belongs") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start:,}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


@dataclass
class _Findings:
    """What was found while reading: where each value stands, and the faults with their lines."""

    name: str
    lines: dict[Path, int] = field(default_factory=dict)
    overridden: set[Path] = field(default_factory=set)
    faults: list[tuple[int, str]] = field(default_factory=list)

    def origin_of(self, key: str) -> str:
        """Where the value of a key of KEYS was written."""
        path = tuple(key.split("."))
        if any(other[: len(path)] == path for other in self.overridden):
            return "command line"
        return f"{self.name}:{self.lines[path]}" if path in self.lines else "default"

    def said(self) -> Iterable[str]:
        return dict.fromkeys(message for _, message in sorted(self.faults, key=lambda it: it[0]))

    def fault(self, path: Path, message: str) -> None:
        """Note a fault at the line of `path`, or of the innermost thing around it that has one."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.overridden:
                self._on_command_line(message)
                return
            if line := self.lines.get(path[:length]):
                self._say_at(line, f"{self.name}:{line}: {message}")
                return
        self._on_command_line(message)

    def read_file(self, text: str) -> dict[str, Any]:
        document = read_document(text)
        self.lines = document.lines
        for line, message in document.faults:
            self._say_at(line, f"{self.name}:{line}: {message}")
        if document.tree is None:
            return {}
        if not isinstance(document.tree, dict):
            groups = ", ".join(names_in(""))
            self.fault((), f"found {_show(document.tree)}; write keys: {groups}")
            return {}
        return document.tree

    def override(self, tree: dict[str, Any], given: str) -> None:
        """Put `key=value` into the tree; the value is read as YAML, like the file's."""
        key, equals, written = given.partition("=")
        key = key.strip().removeprefix("--")
        if not equals:
            self._on_command_line(f"{given!r}: write it as key=value")
            return
        if key in GROUPS:
            self._on_command_line(f"{key}: a group; name a setting in it, such as {_example(key)}")
            return
        document = read_document(written)
        if document.faults:
            self._on_command_line(f"{key}: {document.faults[0][1]}, in {written!r}")
            return
        path = _path_of(key)
        if path in self.overridden:
            self._on_command_line(f"{key}: given twice")
            return
        self.overridden.add(path)
        here = tree
        for part in path[:-1]:
            inner = here.get(str(part))
            here[str(part)] = here = inner if isinstance(inner, dict) else {}
        here[str(path[-1])] = document.tree

    def give_way(self, tree: dict[str, Any]) -> None:
        """Take out of the tree what the command line put another setting in place of."""
        for pair in REPLACES:
            for new, old in (pair, pair[::-1]):
                group, name = old.split(".")
                inside = tree.get(group, {})
                given = inside.get(new.split(".")[1]) is not None
                if (
                    given
                    and _path_of(new) in self.overridden
                    and _path_of(old) not in self.overridden
                ):
                    inside.pop(name, None)
                    self.lines.pop((group, name), None)

    def _on_command_line(self, message: str) -> None:
        self._say_at(10**9, f"command line: {message}")

    def _say_at(self, line: int, message: str) -> None:
        """Keep a fault; what a terminal would obey or not show is spelt out."""
        shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        self.faults.append((line, shown))

    def refuse_unknown(self, tree: dict[str, Any]) -> None:
        """Name every unknown key with the nearest known one, and take it out of the tree."""
        self._refuse_in(tree, (), names_in(""))
        for group in GROUPS:
            inside = tree.get(group)
            if inside is None:
                tree.pop(group, None)
            elif isinstance(inside, dict):
                self._refuse_in(inside, (group,), names_in(group))
            else:
                del tree[group]
                self.fault((group,), f"{group}: found {_show(inside)}; write its settings under it")
        data = tree.get("data", {})
        for rows in ("train", "eval"):
            listed = data.get(rows)
            for i, source in enumerate(listed if isinstance(listed, list) else [listed]):
                path: Path = ("data", rows, i) if isinstance(listed, list) else ("data", rows)
                if isinstance(source, dict):
                    self._refuse_in(source, path, list(Source.model_fields))

    def _refuse_in(self, tree: dict[str, Any], path: Path, known: list[str]) -> None:
        for name in [name for name in tree if name not in known]:
            del tree[name]
            meant = nearest_key(name, spell(path))
            mend = f"did you mean {meant}?" if meant else f"known here: {', '.join(known)}"
            self.fault((*path, name), f"{spell((*path, name))}: unknown key; {mend}")

    def validate(self, tree: dict[str, Any]) -> RunConfig | None:
        try:
            run = RunConfig.model_validate(tree)
        except ValidationError as error:
            wrong = _by_value(error, tree)
            for path, messages in wrong.items():
                self.fault(path, _say(path, messages, tree))
            self._hold_to_rules(_without(tree, wrong), but={spell(path[:2]) for path in wrong})
            return None
        self._hold_to_rules(tree, but=set())
        if not self.faults:
            for path, message in variant_faults(resolve(run)):
                self.fault(path, message)
        return run

    def _hold_to_rules(self, tree: dict[str, Any], *, but: set[str]) -> None:
        """Note every broken rule, but those about values that are wrong in themselves."""
        try:
            run = RunConfig.model_validate(tree)
        except ValidationError:
            return
        for rule in broken_rules(run):
            if not but & set(rule.keys):
                path = tuple(rule.keys[0].split("."))
                self.fault(path, f"{rule.keys[0]}: {rule.needs}")


def _without(tree: dict[str, Any], wrong: Iterable[Path]) -> dict[str, Any]:
    """The tree less the settings that hold a wrong value."""
    gone = {path[:2] for path in wrong}
    return {
        group: {name: value for name, value in inside.items() if (group, name) not in gone}
        if isinstance(inside, dict)
        else inside
        for group, inside in tree.items()
        if (group,) not in gone
    }


def _path_of(key: str) -> Path:
    """`train.learning_rate` as a path; what follows a key that holds a table is one name in it."""
    for known in sorted(KEYS, key=len, reverse=True):
        if key.startswith(known + "."):
            return (*known.split("."), key[len(known) + 1 :])
    return tuple(key.split("."))


def _example(group: str) -> str:
    name = names_in(group)[0]
    return f"{group}.{name}={KEYS[f'{group}.{name}'].default}"


def _by_value(error: ValidationError, tree: dict[str, Any]) -> dict[Path, list[str]]:
    """Pydantic's errors under the path of the value they are about.

    Its locations name branches of a union too (`data.train.list.1.source.weight`); those are not
    in the tree and are left out.
    """
    found: dict[Path, list[str]] = {}
    for each in error.errors():
        here: Any = tree
        path: Path = ()
        for part in each["loc"]:
            named = isinstance(here, dict) and part in here
            counted = isinstance(here, list) and isinstance(part, int) and part < len(here)
            if named or counted:
                here, path = here[part], (*path, part)
            elif each["type"] == "missing" and part == each["loc"][-1]:
                path = (*path, part)
        message = each["msg"].removeprefix("Value error, ")
        found.setdefault(path, []).append(message if each["type"] == "missing" else "")
    return found


def _say(path: Path, messages: list[str], tree: dict[str, Any]) -> str:
    value: Any = tree
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return f"{spell(path)}: missing; every source needs one"
    known, inside = _field_of(path)
    wanted = accepts(known) if known else ""
    label = "expected" if not inside else f"expected in {inside}"
    return f"{spell(path)}: found {_show(value)}, {label} {wanted}{_nearest_word(value, wanted)}"


def _field_of(path: Path) -> tuple[Any, str]:
    """The field a path is about; for a value inside a list or table also the key it is inside."""
    for length in range(len(path), 0, -1):
        key = spell(path[:length])
        if key in KEYS:
            rest = [part for part in path[length:] if isinstance(part, str)]
            if rest and rest[-1] in Source.model_fields and key in ("data.train", "data.eval"):
                return Source.model_fields[rest[-1]], ""
            return KEYS[key], key if length < len(path) else ""
    return None, ""


def _nearest_word(value: Any, wanted: str) -> str:
    if not isinstance(value, str) or "one of " not in wanted:
        return ""
    words = wanted.replace("one of ", "").replace("or ", "").split(", ")
    close = difflib.get_close_matches(value.lower(), words, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value[:60]!r}" + ("…" if len(value) > 60 else "")
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"a table of {', '.join(list(value)[:5])}" if value else "an empty table"
    return f"{value!r}"[:60]
