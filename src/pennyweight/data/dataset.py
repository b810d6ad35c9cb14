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

from pennyweight.config import DataConfig, Source
from pennyweight.data.conversation import Conversation
from pennyweight.data.formats import RowRefusedError, as_conversation, detect, renamed
from pennyweight.data.hub import hub_files
from pennyweight.data.read import Faults, Row, data_files, nearest, read_rows, suffix_of
from pennyweight.data.trees import grown
from pennyweight.errors import DataError

__all__ = ["Located", "Read", "content_sha256", "hold_out", "locate", "read", "weighted"]

HELD_OUT_ROWS = 500
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?$")


@dataclass(frozen=True, slots=True)
class Located:
    """A source whose files are at hand; `builtin` has none."""

    source: Source
    files: tuple[Path, ...]
    names: tuple[str, ...]  # how each file is called in `file:line`
    format: str


@dataclass(frozen=True, slots=True)
class Read:
    """The conversations of one source in file order, and the format they were found in."""

    conversations: list[Conversation]
    format: str


def locate(sources: str | Source | Sequence[str | Source], config: DataConfig) -> list[Located]:
    """Find the files of each source; Hub datasets are downloaded. All faults in one DataError."""
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
    called = Counter(name for each in located for name in each.names)
    if max(called.values(), default=1) == 1:
        return located
    # Two files of one name are told apart by their whole paths.
    return [replace(each, names=tuple(map(str, each.files))) for each in located]


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
    rows = _rows(located, faults)
    columns = located.source.columns or columns
    form = located.format
    conversations: list[Conversation] = []
    flat: list[Row] = []
    for row in rows:
        try:
            value = renamed(row.value, columns)
            if form == "auto":
                form = detect(value)
            if form == "openassistant" and _is_flat(value):
                flat.append(Row(row.source, value))
                continue
            conversations.append(as_conversation(value, row.source, form))
        except RowRefusedError as refused:
            faults.add(row.source, str(refused))
            if form == "auto":
                break  # the same fault for every row
    for row in grown(flat, faults):
        try:
            conversations.append(as_conversation(row.value, row.source, form))
        except RowRefusedError as refused:
            faults.add(row.source, str(refused))
    return Read(conversations, form)


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


def weighted(count: int, weight: float, *, seed: int, name: str) -> list[int]:
    """Indices of the rows a source of `count` gives: floor(weight * count) of them, in file order.

    Weight 2.5 gives every row twice and half of them once more; which half is chosen by seed.
    """
    whole, part = divmod(int(weight * count + 1e-9), count) if count else (0, 0)
    by_key = sorted(range(count), key=lambda i: _key(f"{name}\0{i}", seed))
    extra = set(by_key[:part])
    return [i for i in range(count) for _ in range(whole + (i in extra))]


def hold_out(
    conversations: Sequence[Conversation], fraction: float, *, seed: int
) -> tuple[list[int], list[int], str]:
    """Indices to train on, indices held out, and what was kept together: `prompt` or `row`.

    A row is held out by the hash of what it asks, so equal questions are never on both sides. Where
    one question makes up much of the data, rows are told apart by question and answer together.
    """
    groups = [_asked(conversation) for conversation in conversations]
    kept_together = "prompt"
    largest = max(Counter(groups).values(), default=0)
    if largest > max(1, fraction * len(groups)):
        groups = [_said(conversation) for conversation in conversations]
        kept_together = "row"
    keys = {group: _key(group, seed) for group in set(groups)}
    sizes = Counter(groups)
    chosen: set[str] = set()
    taken = 0
    for group in sorted(keys, key=lambda g: (keys[g], g)):
        over = taken + sizes[group] > HELD_OUT_ROWS
        if over or (keys[group] >= fraction and taken) or len(chosen) + 1 >= len(keys):
            break
        chosen.add(group)
        taken += sizes[group]
    if fraction == 0:
        chosen = set()
    train = [i for i, group in enumerate(groups) if group not in chosen]
    held = [i for i, group in enumerate(groups) if group in chosen]
    return train, held, kept_together


def _asked(conversation: Conversation) -> str:
    messages = conversation.messages
    before = messages[:-1] if messages[-1].role == "assistant" else messages
    return json.dumps([(m.role, m.content) for m in before], ensure_ascii=False)


def _said(conversation: Conversation) -> str:
    return json.dumps([(m.role, m.content) for m in conversation.messages], ensure_ascii=False)


def _key(text: str, seed: int) -> float:
    """Uniform in [0, 1), the same on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{text}".encode(errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest()) / 2**64
