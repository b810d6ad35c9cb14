"""Many examples as a few flat arrays, so that a hundred thousand rows are memory-mapped files.

Example i is `ids[offsets[i]:offsets[i + 1]]`. A folder holds them as `.npy` files without pickle,
with the SHA-256 of each; it is written whole or not at all and verified when read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from pennyweight.data.arrays import GrowingArray, GrowingTexts, Texts, write_array
from pennyweight.data.conversation import Example
from pennyweight.files import scratch_folder

__all__ = [
    "Examples",
    "ExamplesWriter",
    "Stored",
    "load_folder",
    "put",
    "save_folder",
    "write_manifest",
]

_ARRAYS = ("ids", "trained", "offsets", "whole_lengths", "sources", "source_ends")
_MANIFEST = "manifest.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")  # of a part or an array: it becomes a file's


class Examples(Sequence[Example]):
    """A read-only sequence of examples; slices and `subset` share the arrays."""

    def __init__(
        self,
        ids: np.ndarray,
        trained: np.ndarray,
        offsets: np.ndarray,
        whole_lengths: np.ndarray,
        sources: Texts,
        chosen: np.ndarray | None = None,
    ) -> None:
        self._ids, self._trained, self._offsets = ids, trained, offsets
        self._whole_lengths, self._sources = whole_lengths, sources
        self._chosen = np.arange(len(sources)) if chosen is None else chosen

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        lengths = [len(example.ids) for example in examples]
        return cls(
            np.concatenate([e.ids for e in examples] or [np.zeros(0, np.int32)]),
            np.concatenate([e.trained for e in examples] or [np.zeros(0, bool)]),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            np.array([e.length_before_cut for e in examples], dtype=np.int64),
            Texts.of(e.source for e in examples),
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, `[examples]`."""
        lengths: np.ndarray = np.diff(self._offsets)[self._chosen]
        return lengths

    @property
    def trained_lengths(self) -> np.ndarray:
        """Trained tokens of each example, `[examples]`."""
        if not len(self._chosen):
            return np.zeros(0, np.int64)
        counts: np.ndarray = np.add.reduceat(self._trained, self._offsets[:-1], dtype=np.int64)
        return counts[self._chosen]

    @property
    def trained_tokens(self) -> int:
        return int(self.trained_lengths.sum())

    def subset(self, indices: Sequence[int] | np.ndarray) -> Examples:
        """The examples at these indices, which may repeat."""
        chosen = self._chosen[np.asarray(indices, dtype=np.int64)]
        return Examples(
            self._ids,
            self._trained,
            self._offsets,
            self._whole_lengths,
            self._sources,
            chosen,
        )

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.subset(np.arange(len(self))[index])
        i = int(self._chosen[index])
        start, stop = int(self._offsets[i]), int(self._offsets[i + 1])
        return Example(
            self._ids[start:stop],
            self._trained[start:stop],
            self._sources[i],
            int(self._whole_lengths[i]),
        )

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def source(self, index: int) -> str:
        """Where one example came from."""
        return self._sources[int(self._chosen[index])]

    @property
    def sources(self) -> list[str]:
        return [self.source(i) for i in range(len(self))]


class ExamplesWriter:
    """Examples of one part of the data, written to a folder as they come."""

    def __init__(self, folder: Path, part: str) -> None:
        self._folder, self._part = folder, part
        self._ids = GrowingArray(folder / f"{part}.ids.npy", np.int32)
        self._trained = GrowingArray(folder / f"{part}.trained.npy", np.bool_)
        self._ends, self._whole_lengths, self._sources = array("q", [0]), array("q"), GrowingTexts()

    def __len__(self) -> int:
        return len(self._whole_lengths)

    def add(self, example: Example) -> None:
        self._ids.extend(example.ids)
        self._trained.extend(example.trained)
        self._ends.append(self._ends[-1] + len(example.ids))
        self._whole_lengths.append(example.length_before_cut)
        self._sources.add(example.source)

    def finished(self) -> Examples:
        """All of them, memory-mapped."""
        ids, trained, sources = (
            self._ids.finished(),
            self._trained.finished(),
            self._sources.finished(),
        )
        offsets, whole_lengths, letters, ends = (
            write_array(self._folder / f"{self._part}.{name}.npy", values)
            for name, values in (
                ("offsets", np.array(self._ends, np.int64)),
                ("whole_lengths", np.array(self._whole_lengths, np.int64)),
                ("sources", sources.letters),
                ("source_ends", sources.ends),
            )
        )
        return Examples(ids, trained, offsets, whole_lengths, Texts(letters, ends))


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """What a folder holds: the examples of each part, further arrays, and plain facts."""

    parts: dict[str, Examples]
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


def save_folder(folder: Path, parts: Mapping[str, Examples], facts: dict[str, Any]) -> None:
    """Write the examples of each part and what is known of them; the folder appears when whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent) as room:
        for part, examples in parts.items():
            writer = ExamplesWriter(room, part)
            for example in examples:
                writer.add(example)
            writer.finished()
        write_manifest(room, parts=list(parts), arrays=(), facts=facts)
        put(room, folder)


def write_manifest(
    room: Path, *, parts: Sequence[str], arrays: Sequence[str], facts: dict[str, Any]
) -> None:
    """Name what the folder holds, with the sum of each file."""
    sums = {name: _sha256(room / name) for name in sorted(_files(parts, arrays))}
    body = json.dumps(
        {"facts": facts, "parts": list(parts), "arrays": list(arrays), "sha256": sums}
    )
    with (room / _MANIFEST).open("w", encoding="utf-8") as text:
        text.write(json.dumps({"body_sha256": _sha256_text(body)}) + "\n" + body)
        text.flush()
        os.fsync(text.fileno())


def put(room: Path, folder: Path) -> None:
    """Give a finished folder its name. Where another run wrote the same first, that one stays; what
    stands there and is not what was written makes place."""
    try:
        room.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
        if load_folder(folder) is None:
            shutil.rmtree(folder)
            room.rename(folder)


def load_folder(folder: Path) -> Stored | None:
    """What was written, memory-mapped; None where it is missing or not what was written."""
    try:
        head, body = (folder / _MANIFEST).read_text(encoding="utf-8").split("\n", 1)
        if json.loads(head)["body_sha256"] != _sha256_text(body):
            return None
        manifest = json.loads(body)
        parts, arrays = manifest["parts"], manifest["arrays"]
        if not all(map(_NAME.fullmatch, [*parts, *arrays])):
            return None
        if set(manifest["sha256"]) != _files(parts, arrays):
            return None
        if any(_sha256(folder / name) != digest for name, digest in manifest["sha256"].items()):
            return None
        return Stored(
            {part: _examples(folder, part) for part in parts},
            {name: _mapped(folder / f"{name}.npy") for name in arrays},
            manifest["facts"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _files(parts: Sequence[str], arrays: Sequence[str]) -> set[str]:
    return {f"{part}.{name}.npy" for part in parts for name in _ARRAYS} | {
        f"{name}.npy" for name in arrays
    }


def _examples(folder: Path, part: str) -> Examples:
    ids, trained, offsets, whole, sources, ends = (
        _mapped(folder / f"{part}.{name}.npy") for name in _ARRAYS
    )
    return Examples(ids, trained, offsets, whole, Texts(sources, ends))


def _mapped(path: Path) -> np.ndarray:
    # As a plain array: a `memmap` takes ten times as long to give a slice.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
