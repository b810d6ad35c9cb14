"""YAML text to values, each with its line, by the core schema of YAML 1.2 (section 10.3).

PyYAML reads YAML 1.1, where `no` is false, `1e-5` is text and the second of two equal keys wins
unseen. Here only the parser is PyYAML's: what a plain word means, and what is refused, is decided
in this file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

__all__ = ["Document", "Path", "read_document", "spell"]

Path = tuple[str | int, ...]

_MAX_CHARACTERS = 200_000
_MAX_NODES = 5_000
_MAX_DEPTH = 32

_NULLS = {"", "~", "null", "Null", "NULL"}
_TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TEXT_TAG = "tag:yaml.org,2002:str"
_UNTAGGED = {"untagged", _TEXT_TAG, "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"}


@dataclass(frozen=True, slots=True)
class Document:
    """`tree`: the values; `lines`: the line of each key path; `faults`: (line, message) pairs."""

    tree: Any
    lines: dict[Path, int]
    faults: list[tuple[int, str]] = field(default_factory=list)


class _Loader(yaml.SafeLoader):
    """The parser alone: no plain word is given a meaning here."""

    DEFAULT_SCALAR_TAG = "untagged"
    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses in time: parsing a megabyte of brackets takes PyYAML a minute."""
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem=f"more than {_MAX_NODES:,} values", problem_mark=mark
            )
        return super().compose_node(parent, index)


def read_document(text: str) -> Document:
    """Parse one YAML document. Nothing is raised: what is wrong is listed in `faults`."""
    if len(text) > _MAX_CHARACTERS:
        return Document(
            None, {}, [(1, f"the file has {len(text):,} characters, too many to be one")]
        )
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.problem, error.context) if part)
        return Document(None, {}, [(mark.line + 1 if mark else 1, f"not YAML: {said}")])
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return Document(None, {}, [(line, f"not YAML: {error.reason}")])
    except RecursionError:
        return Document(None, {}, [(1, "nested too deeply to be a run's description")])
    except (ValueError, OverflowError) as error:  # an escape beyond Unicode, "\UFFFFFFFF"
        return Document(None, {}, [(1, f"not YAML: {error}")])
    finally:
        if loader is not None:
            loader.dispose()
    if root is None:
        return Document(None, {})
    return _Reader().read(root)


class _Reader:
    """Walks the nodes once, counting; an alias is walked again wherever it stands."""

    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}
        self.faults: list[tuple[int, str]] = []
        self.nodes = 0

    def read(self, root: yaml.Node) -> Document:
        tree = self._value(root, (), ())
        return Document(tree, self.lines, self.faults)

    def _value(self, node: yaml.Node, path: Path, above: tuple[yaml.Node, ...]) -> Any:
        line = node.start_mark.line + 1
        self.lines.setdefault(path, line)
        self.nodes += 1
        if self.nodes > _MAX_NODES:
            if self.nodes == _MAX_NODES + 1:
                self.faults.append(
                    (line, f"more than {_MAX_NODES:,} values once anchors are followed")
                )
            return None
        if node in above:
            self.faults.append((line, "an anchor that contains itself"))
            return None
        if len(above) >= _MAX_DEPTH:
            self.faults.append((line, f"nested more than {_MAX_DEPTH} deep"))
            return None
        if node.tag not in _UNTAGGED:
            self.faults.append((line, f"the tag {node.tag}: remove it, values need none"))
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, (*above, node))
        if isinstance(node, yaml.SequenceNode):
            inside = (*above, node)
            return [self._value(child, (*path, i), inside) for i, child in enumerate(node.value)]
        return _scalar(node)

    def _mapping(self, node: yaml.Node, path: Path, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.faults.append((line, "a key must be a word"))
                continue
            key = key_node.value
            here = (*path, key)
            if key == "<<" and key_node.style is None:
                self.faults.append(
                    (line, "merge keys (<<) are not followed: write the settings out")
                )
                continue
            if key in values:
                first = self.lines[here]
                self.faults.append((line, f"{spell(here)} is given twice, first on line {first}"))
                continue
            self.lines[here] = line
            values[key] = self._value(value_node, here, above)
        return values


def _scalar(node: yaml.Node) -> Any:
    text = node.value
    if node.style is not None or node.tag == _TEXT_TAG:
        return text
    if text in _NULLS:
        return None
    if text in _TRUTHS:
        return _TRUTHS[text]
    if _INTEGER.fullmatch(text) and len(text) < 100:
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text) and len(text) < 100:
        return float(text)
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def spell(path: Path) -> str:
    """`("data", "train", 1, "path")` is written `data.train[1].path`."""
    words = ""
    for part in path:
        words += f"[{part}]" if isinstance(part, int) else f".{part}" if words else part
    return words
