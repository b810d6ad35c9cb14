"""Writing a model's folder: whole or not at all, and one tensor in memory at a time.

The file format is that of safetensors: eight bytes with the header's length, the header as JSON,
then the tensors' bytes back to back.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from pennyweight.errors import ConfigError, DiskError, ModelError
from pennyweight.model.resident import BaseModel

__all__ = [
    "DTYPES",
    "Entry",
    "copy_companions",
    "is_companion",
    "module_of",
    "refuse_taken",
    "torch_dtype",
    "whole_folder",
    "write_index",
    "write_safetensors",
    "write_settings",
]

DTYPES: Final[dict[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

COMPANIONS: Final = (
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
)
"""What stands beside weights and config and belongs to the model all the same."""


# What a checkpoint of quantized weights has beside the codes.
_COMPANION: Final = re.compile(
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+)$"
    r"|\.SCB$|\.weight_format$"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file to be written; `make` gives it, of this dtype and shape, when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(torch.Size(self.shape).numel())


def refuse_taken(out: Path | str) -> None:
    """ConfigError if `out` exists and is not an empty folder."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder; name another --out")


@contextmanager
def whole_folder(out: Path | str) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end, or vanishes if anything fails.

    ConfigError if `out` exists and is not an empty folder; DiskError if the disk refuses.
    """
    out = Path(out)
    refuse_taken(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        partial.replace(out)
    except OSError as fault:
        shutil.rmtree(partial, ignore_errors=True)
        raise DiskError(f"{out}: could not be written ({fault})") from fault
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_safetensors(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write the entries in turn; each is made, written and let go before the next.

    Wide types come first, so that every tensor starts at a multiple of its own width.
    """
    order = sorted(entries, key=lambda key: (-entries[key].dtype.itemsize, key))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key in order:
        entry = entries[key]
        end = at + entry.nbytes
        header[key] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [at, end],
        }
        at = end
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    with path.open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        for key in order:
            tensor = entries[key].make().detach().cpu()
            found = (tensor.dtype, tuple(tensor.shape))
            assert found == (entries[key].dtype, entries[key].shape), (key, found)
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def is_companion(key: str) -> bool:
    """Whether a file's key is a scale or table of a weight stored quantized."""
    return _COMPANION.search(key) is not None


def module_of(base: BaseModel, key: str, modules: Collection[str]) -> str | None:
    """The module whose weight a file's `key` is; files may leave out or add the model's prefix."""
    if not key.endswith(".weight"):
        return None
    path, prefix = key.removesuffix(".weight"), f"{base.module.base_model_prefix}."
    places = (path, prefix + path, path.removeprefix(prefix))
    return next((place for place in places if place in modules), None)


def write_index(folder: Path, files: Mapping[str, Mapping[str, Entry]]) -> None:
    """The index of a folder of several weight files; of a single one there is none."""
    if len(files) < 2:
        return
    size = sum(entry.nbytes for entries in files.values() for entry in entries.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {key: name for name, entries in files.items() for key in entries},
    }
    _write_json(folder / "model.safetensors.index.json", index)


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """config.json of the folder being written."""
    _write_json(folder / "config.json", settings)


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, generation settings and licence, byte for byte."""
    wanted = {path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    for path in sorted(wanted):
        shutil.copyfile(path, folder / path.name)


def torch_dtype(name: str, where: str) -> torch.dtype:
    """The type that safetensors calls `name`."""
    try:
        return DTYPES[name]
    except KeyError:
        raise ModelError(f"{where}: stored as {name}, which is not read here") from None


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
