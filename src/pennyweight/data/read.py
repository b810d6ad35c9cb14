"""Files to raw rows, each with the place it came from; what is wrong is collected, named by line.

JSON Lines, CSV, TSV, text and Parquet are read in a stream, so memory does not grow with the file;
a JSON array is held whole. `.gz` of any of them is read through.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pennyweight.errors import DataError

__all__ = ["Faults", "Row", "data_files", "nearest", "read_rows", "suffix_of"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
_Bytes = io.BufferedReader | gzip.GzipFile
_LINE_LIMIT_BYTES = 64 * 2**20
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_NOT_TEXT = {"license.txt", "source.txt", "readme.txt", "readme.md", "notice.txt"}
_SHOWN_FAULTS = 20


@dataclass(frozen=True, slots=True)
class Row:
    """`value` as the file gives it, and `source`: `my.jsonl:17`."""

    source: str
    value: Any


class Faults:
    """What is wrong with the data, collected and raised once; memory does not grow with the count."""

    def __init__(self) -> None:
        self.count = 0
        self._shown: list[str] = []

    def add(self, source: str, what: str) -> None:
        self.count += 1
        if len(self._shown) < _SHOWN_FAULTS:
            self._shown.append(f"{source}: {what}")

    def raise_any(self) -> None:
        if self.count:
            more = self.count - len(self._shown)
            raise DataError.all([*self._shown, *([f"and {more:,} more"] if more else [])])


def nearest(word: str, known: Iterator[str] | list[str] | tuple[str, ...]) -> str:
    """`; did you mean "assistant"?`, or nothing where nothing is near."""
    close = get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def suffix_of(path: Path | str) -> str:
    """`.jsonl` of `a.jsonl.gz`."""
    name = Path(path).name.lower().removesuffix(".gz")
    return Path(name).suffix


def data_files(folder: Path, split: str | None = None) -> list[Path]:
    """Files of rows below a folder, by name; with a split, those that have it in their path."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and suffix_of(path) in SUFFIXES
        and path.name.lower() not in _NOT_ROWS | _NOT_TEXT
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if split is not None:
        found = [path for path in found if names_split(str(path.relative_to(folder)), split)]
    if not found:
        wanted = f" for split {split!r}" if split else ""
        raise DataError(f"{folder}: no file of rows{wanted}; expected one of {' '.join(SUFFIXES)}")
    return found


def names_split(path: str, split: str) -> bool:
    return re.search(rf"(^|[^a-z]){re.escape(split.lower())}([^a-z]|$)", path.lower()) is not None


def read_rows(path: Path, faults: Faults, *, name: str | None = None) -> Iterator[Row]:
    """Every row of one file; faults are added, not raised. `name` stands for the file in sources."""
    shown = name or path.name
    reader = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _csv,
        ".txt": _text,
        ".md": _text,
    }.get(suffix_of(path))
    if suffix_of(path) == ".parquet":
        yield from _parquet(path, shown, faults)
        return
    if reader is None:
        raise DataError(
            f"{path}: cannot tell the format by the name; expected one of {' '.join(SUFFIXES)}, "
            "with or without .gz"
        )
    try:
        with _opened(path) as file:
            _refuse_utf16(file, shown)
            yield from reader(file, shown, faults)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _opened(path: Path) -> _Bytes:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _refuse_utf16(file: _Bytes, shown: str) -> None:
    start = file.peek(4)[:4]
    if start[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        raise DataError(
            f"{shown}: is UTF-16, not UTF-8; convert it: iconv -f UTF-16 -t UTF-8 {shown} > utf8-{shown}"
        )


def _lines(file: _Bytes, shown: str, faults: Faults) -> Iterator[tuple[int, str]]:
    """Decoded lines with their numbers from 1, without line ends or a byte order mark."""
    number = 0
    while line := file.readline(_LINE_LIMIT_BYTES):
        number += 1
        if len(line) == _LINE_LIMIT_BYTES:
            raise DataError(
                f"{shown}:{number}: longer than {_LINE_LIMIT_BYTES >> 20} MiB; split it"
            )
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield number, line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            faults.add(f"{shown}:{number}", _not_utf8(error))


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 (byte 0x{byte:02x} at {error.start}); convert the file to UTF-8"


def _json_lines(file: _Bytes, shown: str, faults: Faults) -> Iterator[Row]:
    for number, line in _lines(file, shown, faults):
        if not line.strip():
            continue
        try:
            yield Row(f"{shown}:{number}", _parsed(line))
        except ValueError as error:
            faults.add(f"{shown}:{number}", _why(error))


def _json(file: _Bytes, shown: str, faults: Faults) -> Iterator[Row]:
    """An array of rows, or JSON Lines under a .json name."""
    start = file.peek(1 << 16)[: 1 << 16].removeprefix(b"\xef\xbb\xbf").lstrip()
    first_line = start.split(b"\n", 1)[0]
    if not start.startswith(b"[") or _is_json_line(first_line, has_more=b"\n" in start.rstrip()):
        if start.startswith(b"{") and not _is_json_line(first_line, has_more=True):
            faults.add(f"{shown}:1", "one JSON object, not rows; put the rows in a list [ … ]")
            return
        yield from _json_lines(file, shown, faults)
        return
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        faults.add(f"{shown}:{line}", _not_utf8(error))
        return
    yield from _array(text, shown, faults)


def _is_json_line(line: bytes, *, has_more: bool) -> bool:
    try:
        return has_more and isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


_SPACE = re.compile(r"[ \t\r\n]*")


def _array(text: str, shown: str, faults: Faults) -> Iterator[Row]:
    """The elements of `[a, b, …]`, each with the line it begins on."""
    at, line, counted = _SPACE.match(text, text.index("[") + 1).end(), 1, 0  # type: ignore[union-attr]
    while at < len(text) and text[at] != "]":
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, at = _DECODER.raw_decode(text, at)
            _refuse_surrogates(value, text[counted:at])
            yield Row(f"{shown}:{line}", value)
        except (ValueError, RecursionError) as error:
            place = f"{shown}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else None
            faults.add(place or f"{shown}:{line}", _why(error))
            return
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == ",":
            at = _SPACE.match(text, at + 1).end()  # type: ignore[union-attr]
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            faults.add(f"{shown}:{line}", 'expected "," or "]" after a row')
            return
    if at >= len(text):
        faults.add(f"{shown}:{line}", 'the list is not closed; is the file cut off? expected "]"')
    elif text[at + 1 :].strip():
        faults.add(f"{shown}:{line}", "more text after the list's end")


class _StrictError(ValueError):
    """JSON that Python would take and that is not plain JSON."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise _StrictError(f"{double}: the key stands twice in one object; keep one")
    return row


def _no_constant(name: str) -> None:
    raise _StrictError(f"{name} is not JSON; write null or a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def _parsed(line: str) -> Any:
    try:
        value = _DECODER.decode(line)
    except RecursionError as error:
        raise _StrictError("nested too deeply") from error
    _refuse_surrogates(value, line)
    return value


def _refuse_surrogates(value: Any, text: str) -> None:
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise _StrictError(
                f"half of a surrogate pair (\\u{code:04x}) is not a character; remove it"
            ) from error


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: not JSON: {error.msg}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)


def _csv(file: _Bytes, shown: str, faults: Faults) -> Iterator[Row]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    csv.field_size_limit(_LINE_LIMIT_BYTES)
    reader = csv.reader(text, delimiter="\t" if ".tsv" in shown.lower() else ",", strict=True)
    names: list[str] | None = None
    try:
        for values in reader:
            if not values:
                continue
            if names is None:
                names = values
                if len(set(names)) < len(names):
                    double = next(n for n in names if names.count(n) > 1)
                    faults.add(f"{shown}:1", f"{double}: two columns have this name; rename one")
                    return
            elif len(values) != len(names):
                faults.add(
                    f"{shown}:{reader.line_num}",
                    f"{len(values)} fields where the header names {len(names)} ({', '.join(names)});"
                    " quote fields that hold a separator",
                )
            else:
                yield Row(f"{shown}:{reader.line_num}", dict(zip(names, values, strict=True)))
    except csv.Error as error:
        faults.add(f"{shown}:{reader.line_num}", f"not CSV: {error}")
    except UnicodeDecodeError as error:
        faults.add(f"{shown}:{reader.line_num + 1}", f"near here: {_not_utf8(error)}")
    finally:
        text.detach()


def _text(file: _Bytes, shown: str, faults: Faults) -> Iterator[Row]:
    """Paragraphs apart by blank lines are documents; in a file without blank lines, each line is."""
    start = file.peek(1 << 20).replace(b"\r\n", b"\n")
    by_line = re.search(rb"\n[ \t]*\n[ \t]*\S", start) is None
    begun, held = 0, []
    for number, line in _lines(file, shown, faults):
        if line.strip() and not by_line:
            begun = begun or number
            held.append(line)
        elif line.strip():
            yield Row(f"{shown}:{number}", {"text": line})
        elif held:
            yield Row(f"{shown}:{begun}", {"text": "\n".join(held)})
            begun, held = 0, []
    if held:
        yield Row(f"{shown}:{begun}", {"text": "\n".join(held)})


def _parquet(path: Path, shown: str, faults: Faults) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException  # an extra; only who reads Parquet needs it
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet needs pyarrow; install it: pip install 'pennyweight[data]'"
        ) from error
    try:
        with ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{shown}:{number}", row)
    except (ArrowException, OSError) as error:
        faults.add(shown, f"not a readable Parquet file: {error}")
