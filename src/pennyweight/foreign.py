"""Files from strangers, read within bounds: plain files inside their folder, strict JSON, the
headers of safetensors files (the format's README, "Format").

Everything raises `ForeignError` with what was found and the mend; who reads says where it matters.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "DECODER",
    "ForeignError",
    "StoredTensor",
    "file_in",
    "is_folder",
    "read_json",
    "read_text",
    "refuse_surrogates",
    "stored_tensors",
    "strict_json",
]

JSON_LIMIT_BYTES = 16 * 2**20
HEADER_LIMIT_BYTES = 32 * 2**20
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16,
    "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64,
    "U64": 64, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


class ForeignError(ValueError):
    """A file that is not what it should be."""


def is_folder(name: str) -> bool:
    """Whether a name is that of a folder here; a name that can be none is not."""
    try:
        return Path(name).is_dir()
    except (OSError, ValueError):  # too long, a NUL, half a surrogate pair
        return False


def file_in(folder: Path, name: str) -> Path:
    """`folder/name` if it is a plain file inside the folder; FileNotFoundError if there is none.

    A link may lead to a place in the folder, and from the Hub's cache to its store of blobs.
    """
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(path)
    root, real = folder.resolve(), path.resolve()
    blobs = next((p.parent / "blobs" for p in root.parents if p.name == "snapshots"), None)
    if not real.is_relative_to(root) and not (blobs and real.is_relative_to(blobs)):
        raise ForeignError(
            f"{path}: a link that leads out of the folder, to {real}; put the file itself there"
        )
    if not real.is_file():
        raise ForeignError(f"{path}: not a plain file")
    return path


def read_text(path: Path, limit_bytes: int = JSON_LIMIT_BYTES) -> str:
    """A UTF-8 text of at most `limit_bytes`."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit_bytes + 1)
        if len(raw) > limit_bytes:
            raise ForeignError(
                f"{path}: larger than {limit_bytes / 1e6:,.0f} MB, too large to be one"
            )
        return raw.decode("utf-8")
    except FileNotFoundError:
        raise
    except OSError as fault:
        raise ForeignError(f"{path}: cannot be read ({fault.strerror or fault})") from fault
    except UnicodeDecodeError as fault:
        raise ForeignError(f"{path}: not UTF-8 text (byte {fault.start:,})") from fault


def read_json(path: Path, limit_bytes: int = JSON_LIMIT_BYTES) -> dict[str, Any]:
    """The JSON object in a file."""
    text = read_text(path, limit_bytes)
    try:
        value = strict_json(text)
    except ValueError as fault:
        raise ForeignError(f"{path}: not readable as JSON ({fault})") from fault
    if not isinstance(value, dict):
        raise ForeignError(f"{path}: holds a {type(value).__name__}, not settings")
    return value


def strict_json(text: str) -> Any:
    """Plain JSON: no key twice, no NaN, no half of a surrogate pair, no depth without end.

    Raises ValueError (`json.JSONDecodeError` where a place in the text is known).
    """
    try:
        value = DECODER.decode(text)
    except RecursionError as error:
        raise ForeignError("nested too deeply") from error
    refuse_surrogates(value, text)
    return value


def refuse_surrogates(value: Any, text: str) -> None:
    """ForeignError where the value, parsed from `text`, holds what is no character."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise ForeignError(
                f"half of a surrogate pair (\\u{code:04x}) is not a character; remove it"
            ) from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        double, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ForeignError(f"{double[:60]}: the key stands twice in one object; keep one")
    return row


def _no_constant(name: str) -> None:
    raise ForeignError(f"{name} is not JSON; write null or a number")


DECODER = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a safetensors header; `start` and `stop` are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def stored_tensors(
    path: Path, header_limit_bytes: int = HEADER_LIMIT_BYTES
) -> dict[str, StoredTensor]:
    """The header of a safetensors file, each entry checked against the file's size; sorted by name.

    Entries cover the bytes after the header one by one, without a gap or an overlap.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 10 or header_bytes > min(size - 8, header_limit_bytes):
                raise _not_whole(path, f"a header of {header_bytes:,} bytes in {size:,}")
            header = strict_json(file.read(header_bytes).decode("utf-8"))
    except FileNotFoundError:
        raise
    except OSError as fault:
        raise ForeignError(f"{path}: cannot be read ({fault.strerror or fault})") from fault
    except ValueError as fault:
        if isinstance(fault, ForeignError) and str(path) in str(fault):
            raise
        raise _not_whole(path, f"its header is not JSON: {fault}") from fault
    if not isinstance(header, dict):
        raise _not_whole(path, "its header is no table")
    begin = 8 + header_bytes
    found = {
        name: _entry(path, name, entry, begin)
        for name, entry in sorted(header.items())
        if name != "__metadata__"
    }
    _check_cover(path, found, begin, size)
    return found


def _entry(path: Path, name: str, entry: Any, begin: int) -> StoredTensor:
    wanted = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, Mapping) or set(entry) != wanted:
        raise _not_whole(path, f"the entry {name[:80]!r} is not dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    dtype = entry["dtype"] if isinstance(entry["dtype"], str) else ""
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or dtype not in _BITS:
        raise _not_whole(path, f"the entry {name[:80]!r} has no plain type, shape or offsets")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * _BITS[dtype]:
        raise _not_whole(path, f"{name[:80]!r} has another size than its shape and type")
    return StoredTensor(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _counts(value: Any) -> bool:
    """A short list of whole numbers that a file's size can hold."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(n) is int and 0 <= n < 2**48 for n in value)
    )


def _check_cover(path: Path, found: Mapping[str, StoredTensor], begin: int, size: int) -> None:
    at = begin
    for name, entry in sorted(found.items(), key=lambda it: (it[1].start, it[1].stop)):
        if entry.start != at:
            what = "overlaps another" if entry.start < at else "leaves a gap before it"
            raise _not_whole(path, f"{name[:80]!r} {what}")
        at = entry.stop
    if at != size:
        raise _not_whole(path, f"its tensors end at byte {at:,} of {size:,}")


def _not_whole(path: Path, why: str) -> ForeignError:
    return ForeignError(f"{path}: not a whole safetensors file ({why}); fetch it again")
