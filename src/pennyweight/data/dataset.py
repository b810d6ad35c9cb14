"""Sources to conversations: files, folders, Hub datasets and `builtin`, mixed by weight, split.

What a source gives depends on its content, the settings and the seed, on nothing else: the same
rows are held out on every machine, and rows that ask the same are never on both sides.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pennyweight.config import DataConfig, Source
from pennyweight.data.conversation import Conversation
from pennyweight.data.formats import RowRefusedError, as_conversation, detect, renamed
from pennyweight.data.hub import hub_files
from pennyweight.data.read import Faults, Row, data_files, nearest, read_rows, suffix_of
from pennyweight.data.trees import grown
from pennyweight.errors import DataError

__all__ = [
    "Located",
    "Read",
    "asked_key",
    "content_sha256",
    "held_out",
    "held_out_by_row",
    "locate",
    "read",
    "said_key",
    "told_apart",
    "weighted",
]

HELD_OUT_ROWS = 500
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?$")


@dataclass(frozen=True, slots=True)
class Located:
    """A source whose files are at hand; `builtin` has none."""

    source: Source
    files: tuple[Path, ...]
    names: tuple[str, ...]  # how each file is called in `file:line`
    format: str


class Read:
    """The conversations of one source in file order, read as they are taken; what is wrong is added
    to `faults`. `format` is the one they were found in, once the first is there.
    """

    def __init__(self, located: Located, columns: Mapping[str, str], faults: Faults) -> None:
        self._located, self._faults = located, faults
        self._columns = located.source.columns or columns
        self.format = located.format

    def __iter__(self) -> Iterator[Conversation]:
        flat: list[Row] = []
        for row in _rows(self._located, self._faults):
            try:
                value = renamed(row.value, self._columns)
                if self.format == "auto":
                    self.format = detect(value)
                if self.format == "openassistant" and _is_flat(value):
                    flat.append(Row(row.source, value))  # a tree is whole when the file is
                    continue
                conversation = as_conversation(value, row.source, self.format)
            except RowRefusedError as refused:
                self._faults.add(row.source, str(refused))
                if self.format == "auto":
                    break  # the same fault for every row
            else:
                yield conversation
        for row in grown(flat, self._faults):
            try:
                conversation = as_conversation(row.value, row.source, self.format)
            except RowRefusedError as refused:
                self._faults.add(row.source, str(refused))
            else:
                yield conversation


def locate(sources: str | Source | Sequence[str | Source], config: DataConfig) -> list[Located]:
    """Find the files of each source; Hub datasets are downloaded. All faults in one DataError.

    `told_apart` gives names of their own to files of one name, once all that a run reads are found.
    """
    several = [sources] if isinstance(sources, str | Source) else list(sources)
    located, faults = [], []
    for given in several:
        source = Source(path=given) if isinstance(given, str) else given
        try:
            located.append(_locate(source, source.format or config.format))
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError.all(faults)
    return located


def told_apart(located: Sequence[Located]) -> list[Located]:
    """The same, two files of one name called by as many of their folders as tell them apart."""
    called = {f: name for each in located for f, name in zip(each.files, each.names, strict=True)}
    for parts in range(2, 1 + max((len(file.parts) for file in called), default=0)):
        files_of = Counter(called.values())
        again = {f: str(Path(*f.parts[-parts:])) for f, n in called.items() if files_of[n] > 1}
        called |= again
    return [replace(each, names=tuple(called[f] for f in each.files)) for each in located]


def _locate(source: Source, form: str) -> Located:
    if source.path == "builtin":
        return Located(source, (), (), form)
    path = Path(source.path).expanduser()
    if path.is_dir():
        files = data_files(path, source.split)
        return Located(
            source, tuple(files), tuple(str(f.relative_to(path.parent)) for f in files), form
        )
    if path.exists():
        return Located(source, (path,), (path.name,), form)
    if _HUB_ID.match(source.path) and not suffix_of(path):
        files, names = hub_files(source.path, source.split or "train")
        return Located(source, tuple(files), tuple(names), form)
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = nearest(path.name, beside)
    raise DataError(f"{source.path}: no such file, folder or Hub dataset{near}")


def content_sha256(located: Located) -> str:
    """Of the bytes of the source's files, in order; of what makes its rows for `builtin`.

    DataError: a file is gone, or cannot be read.
    """
    digest = hashlib.sha256()
    if not located.files:
        digest.update(_builtin_identity(located.source))
    for path, name in zip(located.files, located.names, strict=True):
        digest.update(name.encode() + b"\0")
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as fault:
            raise DataError(f"{path}: cannot be read ({fault.strerror}); restore it") from fault
    return digest.hexdigest()


def read(located: Located, columns: Mapping[str, str], faults: Faults) -> Read:
    """All rows of a source as conversations; what is wrong is added to `faults`."""
    return Read(located, columns, faults)


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and "parent_id" in value and "replies" not in value


def _rows(located: Located, faults: Faults) -> Iterator[Row]:
    if not located.files:
        yield from _builtin_rows(located.source)
    for path, name in zip(located.files, located.names, strict=True):
        yield from read_rows(path, faults, name=name)


def _builtin_rows(source: Source) -> Iterator[Row]:
    from pennyweight.builtin import task  # reads the standard library; only who asks pays

    for row in task.rows(source.split or "train"):  # type: ignore[arg-type]
        yield Row(f"builtin/{row['source']}", row)


def _builtin_identity(source: Source) -> bytes:
    """The rows are a function of this Python, whose library they are read from, and of that code."""
    from pennyweight.builtin import task

    code = Path(task.__file__).read_bytes()
    return f"{sys.version}\0{source.split}\0".encode() + code


def weighted(count: int, weight: float, *, seed: int, name: str) -> np.ndarray:
    """How often each row of a source of `count` is taken, floor(weight * count) in all.

    Weight 2.5 takes every row twice and half of them once more; which half is chosen by seed.
    """
    whole, part = divmod(int(weight * count + 1e-9), count) if count else (0, 0)
    times = np.full(count, whole, np.int64)
    if part:
        keys = np.array([_key(f"{name}\0{i}", seed) for i in range(count)], np.uint64)
        times[np.argsort(keys, kind="stable")[:part]] += 1
    return times


def asked_key(conversation: Conversation, seed: int) -> int:
    """Of what a row asks, as a uniform uint64, the same on every machine."""
    messages = conversation.messages
    before = messages[:-1] if messages[-1].role == "assistant" else messages
    return _key(json.dumps([(m.role, m.content) for m in before], ensure_ascii=False), seed)


def said_key(conversation: Conversation, seed: int) -> int:
    """The same of what is asked and answered."""
    said = [(m.role, m.content) for m in conversation.messages]
    return _key(json.dumps(said, ensure_ascii=False), seed)


def held_out(keys: np.ndarray, fraction: float) -> np.ndarray | None:
    """Which rows are held out by their keys, bool `[rows]`; rows of one key are on one side.

    None where one key has more than that share of the rows: they must be told apart otherwise.
    """
    groups, of_row, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    if max(sizes, default=0) > max(1, fraction * len(keys)):
        return None
    return _lowest(groups, sizes, fraction)[of_row]


def held_out_by_row(keys: np.ndarray, fraction: float) -> np.ndarray:
    """The same whatever the share of a key."""
    groups, of_row, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    return _lowest(groups, sizes, fraction)[of_row]


def _lowest(groups: np.ndarray, sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Which of the groups, in order of their keys, are held out."""
    chosen, taken = np.zeros(len(groups), np.bool_), 0
    for number, (key, size) in enumerate(zip(groups.tolist(), sizes.tolist(), strict=True)):
        over = taken + size > HELD_OUT_ROWS
        if over or (key / 2**64 >= fraction and taken) or number + 1 >= len(groups):
            break
        chosen[number] = fraction > 0
        taken += size
    return chosen


def _key(text: str, seed: int) -> int:
    """Uniform over 64 bits, the same on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode(errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest())
