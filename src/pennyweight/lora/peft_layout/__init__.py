"""An adapter's folder as PEFT lays it out: `adapter_config.json` and `adapter_model.safetensors`.

The names of PEFT's files, keys and settings live in this room and nowhere else. Reading is strict
and collects every fault; what is passed over is said in notes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pennyweight.errors import AdapterError
from pennyweight.files import whole
from pennyweight.foreign import ForeignError, file_in
from pennyweight.foreign import read_json as read_foreign_json
from pennyweight.lora.peft_layout.settings import (
    config_from,
    narrowing,
    settings_of,
    strange_settings,
    targeted,
)
from pennyweight.lora.peft_layout.tensors import (
    TENSORS,
    product_fault,
    read_tensors,
    tensors_of,
)

__all__ = [
    "SETTINGS",
    "TENSORS",
    "config_from",
    "narrowing",
    "product_fault",
    "read_json",
    "read_tensors",
    "settings_of",
    "strange_settings",
    "targeted",
    "tensors_of",
    "write_json",
    "write_tensors",
    "write_text",
]

SETTINGS = "adapter_config.json"


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The settings in a file of the folder, None where there is none; AdapterError if they are not JSON."""
    try:
        return read_foreign_json(file_in(folder, name))
    except FileNotFoundError:
        return None
    except ForeignError as fault:
        raise AdapterError(str(fault)) from fault


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with whole(path) as partial:
        save_file(dict(tensors), partial, metadata={"format": "pt"})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
