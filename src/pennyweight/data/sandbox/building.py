"""Text that a template builds in one call, bounded before it is built: joins, formats, JSON.

A method of text is either in `METHODS`, where no result is larger than its arguments make plain,
or replaced by one of `BUILDERS`, or refused: `"\\t".expandtabs(10**9)` is one call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from string import Formatter
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from pennyweight.data.sandbox.meter import (
    OUTPUT_LIMIT_CHARS,
    metered,
    printable,
    the_meter,
    too_large,
)

__all__ = [
    "BUILDERS",
    "METHODS",
    "check_arguments",
    "check_format",
    "check_percent",
    "indented",
    "join",
    "refuse_method",
    "to_json",
]

NUMBER_LIMIT = 100_000
_WIDTH_DIGITS = 5
_MARGIN_CHARS = 16

METHODS = frozenset([
    "capitalize", "casefold", "center", "count", "endswith", "find", "index", "isalnum",
    "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric",
    "isprintable", "isspace", "istitle", "isupper", "ljust", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "rfind", "rindex", "rjust", "rpartition", "rsplit",
    "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
    "zfill",
])  # fmt: skip


def check_arguments(arguments: Iterable[Any]) -> None:
    """Refuse numbers that no text needs, such as `x.ljust(10**10)`."""
    if any(isinstance(value, int) and abs(value) > NUMBER_LIMIT for value in arguments):
        raise too_large()


def join(items: Iterable[Any], glue: str = "", attribute: str | None = None) -> str:
    """The filter; the method is `BUILDERS["join"]`."""
    glue = str(glue)
    values = items if attribute is None else (item[attribute] for item in items)
    return _joined(glue, (str(printable(item)) for item in values))


def _joined(glue: str, parts: Iterable[str]) -> str:
    held, chars = [], 0
    for part in metered(parts):
        held.append(part)
        chars += len(part) + len(glue) if isinstance(part, str) else 0
        if chars > OUTPUT_LIMIT_CHARS:
            raise too_large()
    return glue.join(held)


def _replaced(text: str, old: str, new: str, count: int = -1) -> str:
    if len(text) + text.count(old) * len(new) > OUTPUT_LIMIT_CHARS:
        raise too_large()
    return text.replace(old, new, count)


BUILDERS: dict[str, Callable[..., str]] = {"join": _joined, "replace": _replaced}


def check_format(pattern: str, values: Sequence[Any]) -> None:
    """Refuse what `pattern.format(values)` could build too large of."""
    fields = 0
    for _, name, spec, _ in Formatter().parse(pattern):
        fields += name is not None
        if spec and ("{" in spec or _is_wide(spec)):
            raise too_large()
    _check_repeated(pattern, fields, values)


def check_percent(pattern: str, values: Any) -> None:
    """The same for `pattern % values`."""
    if "*" in pattern or _is_wide(pattern):
        raise too_large()
    several = values.values() if isinstance(values, dict) else values
    held = list(several) if isinstance(several, list | tuple | type({}.values())) else [values]
    _check_repeated(pattern, pattern.count("%"), held)


def _check_repeated(pattern: str, fields: int, values: Sequence[Any]) -> None:
    longest = max((len(str(printable(value))) for value in values), default=0)
    if len(pattern) + fields * (longest + 10**_WIDTH_DIGITS * _is_padded(pattern)) > (
        OUTPUT_LIMIT_CHARS
    ):
        raise too_large()


def _is_wide(text: str) -> bool:
    return any(len(number) > _WIDTH_DIGITS for number in _numbers(text))


def _is_padded(text: str) -> bool:
    return any(len(number) > 2 for number in _numbers(text))


def _numbers(text: str) -> list[str]:
    return "".join(c if c.isdigit() else " " for c in text).split()


def indented(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """The filter `indent`."""
    margin = width if isinstance(width, int) else len(width)
    if margin * (text.count("\n") + 1) > OUTPUT_LIMIT_CHARS:
        raise too_large()
    return jinja2.filters.do_indent(text, width, first, blank)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`, as transformers has it: nothing is escaped for the web."""
    margin = indent if isinstance(indent, int) else len(indent or "")
    if margin > _MARGIN_CHARS or any(len(str(s)) > _MARGIN_CHARS for s in separators or ()):
        raise too_large()
    if margin and _depth_of_items(value) * margin > OUTPUT_LIMIT_CHARS:
        raise too_large()
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _depth_of_items(value: Any) -> int:
    """Every item of every list and dict, times how deep it stands."""
    total, waiting = 0, [(value, 1)]
    while waiting:
        held, depth = waiting.pop()
        if isinstance(held, list | tuple | dict):
            total += len(held) * depth
            inner = held.values() if isinstance(held, dict) else held
            waiting += [(each, depth + 1) for each in inner]
            the_meter().step()
    return total


def refuse_method(name: str) -> SecurityError:
    return SecurityError(f"chat template: text has no method {name!r} here; templates need none")
