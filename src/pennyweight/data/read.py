"""Files to raw rows, each with the place it came from; what is wrong is collected, named by line.

Every format is read in a stream, so memory does not grow with the file; no line, row or document
is longer than 64 MiB. `.gz` of any of them is read through.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pennyweight.errors import DataError
from pennyweight.foreign import DECODER, refuse_surrogates, strict_json

__all__ = ["Faults", "Row", "data_files", "nearest", "read_rows", "suffix_of"]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
_Bytes = io.BufferedReader | gzip.GzipFile
_LINE_LIMIT_BYTES = 64 * 2**20
_CHUNK_BYTES = 2**20
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
            said = f"{source}: {what}"
            # Rows are quoted: what would break the line, or a terminal would obey, is spelt out.
            self._shown.append("".join(c if c.isprintable() else ascii(c)[1:-1] for c in said))

    def raise_any(self) -> None:
        if self.count:
            more = self.count - len(self._shown)
            raise DataError.all([*self._shown, *([f"and {more:,} more"] if more else [])])


def nearest(word: object, known: Iterator[str] | list[str] | tuple[str, ...]) -> str:
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
    except (OSError, EOFError, zlib.error) as error:
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
            yield Row(f"{shown}:{number}", strict_json(line))
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
        yield from _array(file, shown, faults)
    except UnicodeDecodeError as error:
        faults.add(shown, _not_utf8(error))


def _is_json_line(line: bytes, *, has_more: bool) -> bool:
    try:
        return has_more and isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


_SPACE = re.compile(r"[ \t\r\n]*")


class _Window:
    """A file's text, seen through a window that moves: what is parsed is let go."""

    def __init__(self, file: _Bytes) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.ended = "", 0, 1, False
        self.more()

    def more(self) -> bool:
        """Widen the window to at least twice what is left in it; False at the file's end."""
        if self.ended:
            return False
        wanted = max(_CHUNK_BYTES, len(self.text) - self.at)
        chunk = self._file.read(wanted)
        self.ended = not chunk
        self.line += self.text.count("\n", 0, self.at)
        self.text = self.text[self.at :] + self._decoder.decode(chunk, final=self.ended)
        self.at = 0
        return not self.ended

    def character(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def here(self, at: int | None = None) -> int:
        """The line of a place in the window."""
        return self.line + self.text.count("\n", 0, self.at if at is None else at)

    def value(self) -> Any:
        """The JSON value that begins here, whole; ValueError where it is none."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
                # A number may go on behind the window.
                if end < len(self.text) or not self.more():
                    break
            except json.JSONDecodeError:
                if len(self.text) - self.at > _LINE_LIMIT_BYTES or not self.more():
                    raise
        refuse_surrogates(value, self.text[self.at : end])
        self.at = end
        return value


def _array(file: _Bytes, shown: str, faults: Faults) -> Iterator[Row]:
    """The elements of `[a, b, …]`, each with the line it begins on; one at a time in memory."""
    window = _Window(file)
    window.character()
    window.at += 1  # the bracket
    while (first := window.character()) not in ("", "]"):
        line = window.here()
        try:
            value = window.value()
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else None
            faults.add(f"{shown}:{window.here(at)}", _why(error))
            return
        yield Row(f"{shown}:{line}", value)
        first = window.character()
        if first == ",":
            window.at += 1
        elif first not in ("", "]"):
            faults.add(f"{shown}:{window.here()}", 'expected "," or "]" after a row')
            return
    if first == "":
        faults.add(
            f"{shown}:{window.here()}", 'the list is not closed; is the file cut off? expected "]"'
        )
        return
    window.at += 1
    if window.character():
        faults.add(f"{shown}:{window.here()}", "more text after the list's end")


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}: not JSON: {error.msg}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return _not_utf8(error)
    return str(error)


def _csv(file: _Bytes, shown: str, faults: Faults) -> Iterator[Row]:
    csv.field_size_limit(_LINE_LIMIT_BYTES)
    reader = csv.reader(
        _csv_lines(file, shown), delimiter="\t" if ".tsv" in shown.lower() else ",", strict=True
    )
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
        faults.add(f"{shown}:{reader.line_num + 1}", _not_utf8(error))


def _csv_lines(file: _Bytes, shown: str) -> Iterator[str]:
    """Lines with their ends, as the csv module wants them; none is longer than memory can bear."""
    number = 0
    while line := file.readline(_LINE_LIMIT_BYTES):
        number += 1
        if len(line) == _LINE_LIMIT_BYTES:
            raise DataError(
                f"{shown}:{number}: longer than {_LINE_LIMIT_BYTES >> 20} MiB; split it"
            )
        yield (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8")


def _text(file: _Bytes, shown: str, faults: Faults) -> Iterator[Row]:
    """Paragraphs apart by blank lines are documents; in a file without blank lines, each line is."""
    start = file.peek(1 << 20).replace(b"\r\n", b"\n")
    by_line = re.search(rb"\n[ \t]*\n[ \t]*\S", start) is None
    begun, chars, held = 0, 0, []
    for number, line in _lines(file, shown, faults):
        if line.strip() and not by_line:
            begun = begun or number
            held.append(line)
            chars += len(line)
            if chars > _LINE_LIMIT_BYTES:
                raise DataError(
                    f"{shown}:{begun}: a document of more than {_LINE_LIMIT_BYTES >> 20} MiB; put "
                    "blank lines between documents"
                )
        elif line.strip():
            yield Row(f"{shown}:{number}", {"text": line})
        elif held:
            yield Row(f"{shown}:{begun}", {"text": "\n".join(held)})
            begun, chars, held = 0, 0, []
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
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                double = next(n for n in names if names.count(n) > 1)
                faults.add(shown, f"{double}: two columns have this name; rename one")
                return
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Row(f"{shown}:{number}", row)
    except (ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        faults.add(shown, f"not a readable Parquet file: {error}")
