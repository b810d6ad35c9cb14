"""Conversations kept on a disk while a run's data is prepared, so that memory does not grow with rows."""

from __future__ import annotations

import json
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from pennyweight.data.conversation import Conversation, Message

__all__ = ["Spool"]

_IN_MEMORY_BYTES = 4 << 20


class Spool(Sequence[Conversation]):
    """A sequence that only grows at its end, in a file without a name that goes with it.

    Plain values are written as JSON. What that cannot hold, such as a date from Parquet, stays in
    memory. `chosen` are the places a view shows.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(  # noqa: SIM115 (`close` closes it)
            _IN_MEMORY_BYTES, dir=None if folder is None else str(folder)
        )
        self._ends, self._apart = array("q"), dict[int, Conversation]()
        self._chosen: np.ndarray | None = None

    def append(self, row: Conversation) -> None:
        assert self._chosen is None, "a view is not written to"
        end = self._ends[-1] if self._ends else 0
        try:
            written = json.dumps(_plain(row)).encode("ascii")
        except (TypeError, ValueError, RecursionError):
            self._apart[len(self._ends)], written = row, b""
        self._file.seek(end)
        self._file.write(written)
        self._ends.append(end + len(written))

    def close(self) -> None:
        """Let the file go, from under every view."""
        self._file.close()

    def view(self, places: np.ndarray) -> Spool:
        """The rows at these places, in this order."""
        seen = object.__new__(Spool)
        seen._file, seen._ends, seen._apart = self._file, self._ends, self._apart
        seen._chosen = places if self._chosen is None else self._chosen[places]
        return seen

    def __len__(self) -> int:
        return len(self._ends) if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Spool: ...
    def __getitem__(self, index: int | slice) -> Conversation | Spool:
        if isinstance(index, slice):
            return self.view(np.arange(len(self))[index])
        place = range(len(self))[index]
        if self._chosen is not None:
            place = int(self._chosen[place])
        if (apart := self._apart.get(place)) is not None:
            return apart
        start = self._ends[place - 1] if place else 0
        self._file.seek(start)
        written = self._file.read(self._ends[place] - start).decode("ascii")
        return _conversation(json.loads(written))

    def __iter__(self) -> Iterator[Conversation]:
        return (self[i] for i in range(len(self)))


def _plain(row: Conversation) -> tuple[Any, ...]:
    messages = tuple((m.role, m.content, m.train, dict(m.extra)) for m in row.messages)
    tools = None if row.tools is None else tuple(row.tools)
    return messages, row.source, row.kind, tools


def _conversation(plain: Sequence[Any]) -> Conversation:
    messages, source, kind, tools = plain
    given = None if tools is None else tuple(tools)
    return Conversation(tuple(Message(*each) for each in messages), source, kind, given)
