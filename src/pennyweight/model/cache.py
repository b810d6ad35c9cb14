"""Quantized weights kept from one start to the next: the second start maps them into memory.

An entry is a folder, named by what it was made from: the base's fingerprint, the storage asked for,
the kind of device that quantized, and this format. Only the quantized weights are in it; embeddings,
norms and the head are read from the base as ever. An entry appears whole or not at all, and is held
against its manifest before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pennyweight.errors import ModelError
from pennyweight.files import sync
from pennyweight.foreign import ForeignError, read_json
from pennyweight.model.folder import fingerprint
from pennyweight.model.writing import Entry, write_safetensors
from pennyweight.quant import Quantized4Bit, from_bitsandbytes, to_bitsandbytes

__all__ = ["LIMIT", "KeptBase", "cache_folder", "kept_bases", "limit_bytes"]

LIMIT: Final = "PENNYWEIGHT_BASE_CACHE"
_FORMAT: Final = 1
_WEIGHTS, _MANIFEST = "model.safetensors", "manifest.json"
_DEFAULT_LIMIT_BYTES: Final = 20 * 10**9
# Below this a base is quantized about as fast as an entry is checked.
_LEAST_BYTES: Final = 64 * 10**6


def cache_folder() -> Path:
    """Where entries stand: `bases` in `$PENNYWEIGHT_CACHE`, else in `~/.cache/pennyweight`."""
    named = os.environ.get("PENNYWEIGHT_CACHE")
    return (Path(named) if named else Path.home() / ".cache" / "pennyweight") / "bases"


def limit_bytes() -> int:
    """What all entries together may take: 20 GB, or `$PENNYWEIGHT_BASE_CACHE` gigabytes; `off` is 0."""
    asked = os.environ.get(LIMIT, "").strip().lower()
    if asked == "off":
        return 0
    try:
        return int(float(asked) * 1e9) if asked else _DEFAULT_LIMIT_BYTES
    except (ValueError, OverflowError):
        raise ModelError(f"{LIMIT}={asked[:40]}: expected gigabytes, such as 20, or off") from None


def kept_bases() -> dict[Path, int]:
    """Every entry and its bytes, the one used longest ago first."""
    entries = [each for each in cache_folder().glob("*/") if (each / _MANIFEST).is_file()]
    entries.sort(key=lambda entry: (entry / _MANIFEST).stat().st_mtime)
    return {entry: sum(file.stat().st_size for file in entry.iterdir()) for entry in entries}


@dataclass(frozen=True, slots=True)
class KeptBase:
    """The entry of one base in one storage, there or not."""

    folder: Path
    made_from: Mapping[str, Any]

    @classmethod
    def of(
        cls, base: Path, *, quantization: str, double_quantization: bool, device: torch.device
    ) -> KeptBase:
        made_from = {
            "format": _FORMAT,
            "fingerprint": fingerprint(base),
            "quantization": quantization,
            "double_quantization": double_quantization,
            "device": device.type,
        }
        name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]
        return cls(cache_folder() / name, made_from)

    def read(self) -> dict[str, Quantized4Bit]:
        """The values by weight, mapped from the file; none where there is no entry.

        One that is damaged or of another base is deleted, and that is told.
        """
        if not limit_bytes() or not self.folder.is_dir():
            return {}
        try:
            manifest = read_json(self.folder / _MANIFEST)
            if manifest.get("made_from") != dict(self.made_from):
                raise ModelError("its manifest tells of another base")
            if manifest.get("digest") != fingerprint(self.folder):
                raise ModelError("its bytes are not those that were written")
            values = self._values()
            os.utime(self.folder / _MANIFEST)
        except (ModelError, ForeignError, SafetensorError, OSError, ValueError) as fault:
            shutil.rmtree(self.folder, ignore_errors=True)
            warnings.warn(
                f"{self.folder}: a kept quantized base is damaged ({fault}); it is deleted and made "
                "again from the base",
                stacklevel=2,
            )
            return {}
        return values

    def _values(self) -> dict[str, Quantized4Bit]:
        parts: dict[str, dict[str, Tensor]] = {}
        with safe_open(self.folder / _WEIGHTS, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                root, _, name = key.rpartition(".weight")
                parts.setdefault(root, {})[f"weight{name}"] = file.get_tensor(key)
        values = {f"{root}.weight": from_bitsandbytes(each) for root, each in parts.items()}
        return {key: value for key, value in values.items() if isinstance(value, Quantized4Bit)}

    def write(self, values: Mapping[str, Quantized4Bit]) -> bool:
        """Keep the values, others making room; whether they were kept. A full disk is no fault."""
        entries, limit = _entries(values), limit_bytes()
        size = sum(entry.nbytes for entry in entries.values())
        if not _LEAST_BYTES <= size <= limit or self.folder.exists():
            return False
        root, unfinished = self.folder.parent, None
        try:
            root.mkdir(parents=True, exist_ok=True)
            _make_room(limit - size)
            if shutil.disk_usage(root).free < 2 * size:
                return False
            unfinished = Path(tempfile.mkdtemp(prefix=".partial-", dir=root))
            write_safetensors(unfinished / _WEIGHTS, entries)
            manifest = {"made_from": dict(self.made_from), "digest": fingerprint(unfinished)}
            (unfinished / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            sync(unfinished / _MANIFEST)
            unfinished.replace(self.folder)
        except (
            OSError
        ):  # another process was first, or the disk refuses: the base is in memory anyway
            return False
        finally:
            if unfinished is not None:
                shutil.rmtree(unfinished, ignore_errors=True)
        return True


def _entries(values: Mapping[str, Quantized4Bit]) -> dict[str, Entry]:
    tensors: dict[str, Tensor] = {}
    for key, value in values.items():
        tensors |= to_bitsandbytes(value, key.removesuffix(".weight"))
    return {
        key: Entry(tensor.dtype, tuple(tensor.shape), partial(Tensor.cpu, tensor))
        for key, tensor in tensors.items()
    }


def _make_room(most_bytes: int) -> None:
    """Delete the entries used longest ago until the rest take no more than this."""
    kept = kept_bases()
    left = sum(kept.values())
    for entry, size in kept.items():
        if left <= most_bytes:
            return
        shutil.rmtree(entry, ignore_errors=True)
        left -= size
