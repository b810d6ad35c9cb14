"""Many examples as four flat arrays, so that a hundred thousand rows are one memory-mapped file.

Example i is `ids[offsets[i]:offsets[i + 1]]`. A folder holds them as `.npy` files without pickle,
with the SHA-256 of each; it is written whole or not at all and verified when read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from pennyweight.data.conversation import Example

__all__ = ["Examples", "load_folder", "save_folder"]

_ARRAYS = ("ids", "trained", "offsets", "whole_lengths")
_MANIFEST = "manifest.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")  # of a part: it becomes a file's


class Examples(Sequence[Example]):
    """A read-only sequence of examples; slices and `subset` share the arrays."""

    def __init__(
        self,
        ids: np.ndarray,
        trained: np.ndarray,
        offsets: np.ndarray,
        whole_lengths: np.ndarray,
        sources: Sequence[str],
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
            [e.source for e in examples],
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

    def arrays(self) -> dict[str, np.ndarray]:
        assert len(self._chosen) == len(self._sources), "a subset is not what is stored"
        held = (self._ids, self._trained, self._offsets, self._whole_lengths)
        return dict(zip(_ARRAYS, held, strict=True))

    @property
    def sources(self) -> list[str]:
        return [self._sources[int(i)] for i in self._chosen]


def save_folder(folder: Path, parts: dict[str, Examples], facts: dict[str, Any]) -> None:
    """Write the examples of each part and what is known of them; the folder appears when whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        sums = {}
        for part, examples in parts.items():
            for name, array in examples.arrays().items():
                path = unfinished / f"{part}.{name}.npy"
                with path.open("wb") as file:
                    np.save(file, array, allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
                sums[path.name] = _sha256(path)
        sources = {part: examples.sources for part, examples in parts.items()}
        body = json.dumps({"facts": facts, "sources": sources, "sha256": sums})
        with (unfinished / _MANIFEST).open("w", encoding="utf-8") as text:
            text.write(json.dumps({"body_sha256": _sha256_text(body)}) + "\n" + body)
            text.flush()
            os.fsync(text.fileno())
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another run wrote the same first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load_folder(folder: Path) -> tuple[dict[str, Examples], dict[str, Any]] | None:
    """What `save_folder` wrote, memory-mapped; None where it is missing or not what was written."""
    try:
        head, body = (folder / _MANIFEST).read_text(encoding="utf-8").split("\n", 1)
        if json.loads(head)["body_sha256"] != _sha256_text(body):
            return None
        manifest = json.loads(body)
        named = {f"{part}.{name}.npy" for part in manifest["sources"] for name in _ARRAYS}
        if set(manifest["sha256"]) != named or not all(map(_NAME.fullmatch, manifest["sources"])):
            return None
        if any(_sha256(folder / name) != digest for name, digest in manifest["sha256"].items()):
            return None
        parts = {}
        for part, sources in manifest["sources"].items():
            ids, trained, offsets, whole = (
                np.load(folder / f"{part}.{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in _ARRAYS
            )
            parts[part] = Examples(ids, trained, offsets, whole, sources)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return parts, manifest["facts"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
