"""Arrays that grow on a disk and many short texts as one array, so that rows without number take
little memory.

Files are `.npy` (NumPy's format, version 1.0), whose header leaves room for a length to grow.
"""

from __future__ import annotations

import io
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

__all__ = ["GrowingArray", "GrowingTexts", "Texts", "write_array"]


class GrowingArray:
    """A `.npy` file of one dimension that is written as it grows; `finished` memory-maps it."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self._path, self._dtype, self._length = path, np.dtype(dtype), 0
        self._file = path.open("wb")
        self._file.write(_header(self._dtype, 0))

    def extend(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._length += len(values)

    def finished(self) -> np.ndarray:
        """The whole array, durable and read-only."""
        self._file.seek(0)
        self._file.write(_header(self._dtype, self._length))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return np.load(self._path, mmap_mode="r", allow_pickle=False)


def write_array(path: Path, values: np.ndarray) -> np.ndarray:
    """The same values, memory-mapped from a file made of them."""
    growing = GrowingArray(path, values.dtype)
    growing.extend(values)
    return growing.finished()


def _header(dtype: np.dtype[Any], length: int) -> bytes:
    buffer = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": descr, "fortran_order": False, "shape": (length,)}
    )
    return buffer.getvalue()


class Texts(Sequence[str]):
    """Texts end to end in UTF-8: `letters` uint8, and int64 `ends`, where each text ends."""

    def __init__(self, letters: np.ndarray, ends: np.ndarray) -> None:
        self.letters, self.ends = letters, ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        growing = GrowingTexts()
        for text in texts:
            growing.add(text)
        return growing.finished()

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        start = int(self.ends[place - 1]) if place else 0
        held: bytes = self.letters[start : int(self.ends[place])].tobytes()
        return held.decode(errors="surrogatepass")


class GrowingTexts:
    """Texts as they come, without an object for each."""

    def __init__(self) -> None:
        self._letters, self._ends = bytearray(), array("q")

    def add(self, text: str) -> None:
        self._letters += text.encode(errors="surrogatepass")
        self._ends.append(len(self._letters))

    def finished(self) -> Texts:
        return Texts(
            np.frombuffer(self._letters, np.uint8).copy(),
            np.frombuffer(self._ends, np.int64).copy(),
        )
