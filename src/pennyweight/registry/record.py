"""What is known of a version: the file `version.json` beside its adapter, written once and read strictly.

It holds what can be told without reading a tensor, and the SHA-256 of every other file, so that
what was pulled can be held against what was pushed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import file_digest
from pathlib import Path
from typing import Any

from pennyweight.errors import AdapterError, DiskError
from pennyweight.foreign import ForeignError, file_in, read_json

__all__ = [
    "HASH",
    "KEPT",
    "RECORD",
    "TENSORS",
    "Version",
    "held_out_in",
    "read_version",
    "sha256_of",
]

RECORD = "version.json"
SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
RECEIPT = "receipt.json"
KEPT = (SETTINGS, TENSORS, "pennyweight.json", RECEIPT, "README.md", "chat_template.jinja")
"""The files of an adapter that a registry keeps; the first two are PEFT's, and always there."""
HASH = re.compile(r"[0-9a-f]{64}")
SCHEMA_VERSION = 1
SHOWN = 12


@dataclass(frozen=True, slots=True)
class Version:
    """One adapter as it was kept. `folder` is in PEFT's layout, for any tool to load.

    `base` and `trained` say what it stands beside and what was trained; `parent` and `merged_from`
    are versions it was made from, as far as that is known; `files` has the SHA-256 of each file.
    """

    hash: str
    folder: Path
    base: Mapping[str, Any]
    trained: Mapping[str, Any]
    files: Mapping[str, str]
    data: str | None = None
    parent: str | None = None
    merged_from: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def short(self) -> str:
        return self.hash[:SHOWN]

    def receipt(self) -> dict[str, Any] | None:
        """The receipt of the run that made it, None where there is none that can be read."""
        return _receipt_in(self.folder)

    def settings(self) -> dict[str, Any]:
        """PEFT's settings of it."""
        try:
            return read_json(file_in(self.folder, SETTINGS))
        except (FileNotFoundError, ForeignError) as fault:
            raise DiskError(f"{self.folder}: its {SETTINGS} is gone ({fault}); {_AGAIN}") from fault

    def held_out(self) -> dict[str, Any] | None:
        """Rows measured on, loss before and after with its interval; None where nothing was held out."""
        return held_out_in(self.folder)

    def check(self) -> None:
        """DiskError where a file is no longer what was kept."""
        changed = [
            name
            for name, kept in self.files.items()
            if not (self.folder / name).is_file() or sha256_of(self.folder / name) != kept
        ]
        if changed:
            raise DiskError(
                f"{self.folder}: {', '.join(changed)}: not what was kept there; {_AGAIN}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As it stands in `version.json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "version": self.hash,
            "base": dict(self.base),
            "trained": dict(self.trained),
            "data": self.data,
            "parent": self.parent,
            "merged_from": list(self.merged_from),
            "notes": list(self.notes),
            "files": dict(self.files),
        }

    def text(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"


_AGAIN = "remove the version and add or pull it again"


def held_out_in(folder: Path) -> dict[str, Any] | None:
    """What the receipt in an adapter's folder says of held-out rows; `Version.held_out` tells what."""
    told = (_receipt_in(folder) or {}).get("held_out")
    if not isinstance(told, Mapping) or not isinstance(told.get("after"), Mapping):
        return None
    found: dict[str, Any] = {"rows": told.get("rows")}
    for side in ("before", "after"):
        arm = told.get(side)
        arm = arm if isinstance(arm, Mapping) else {}
        for measure in ("loss", "loss_interval_95", "token_accuracy"):
            found[f"{measure}_{side}"] = arm.get(measure)
    return found


def _receipt_in(folder: Path) -> dict[str, Any] | None:
    try:
        return read_json(file_in(folder, RECEIPT))
    except (FileNotFoundError, ForeignError):
        return None


def read_version(folder: Path) -> Version | None:
    """The record in a folder, None where there is none; AdapterError for one that is not as written here."""
    try:
        told = read_json(file_in(folder, RECORD))
    except FileNotFoundError:
        return None
    except ForeignError as fault:
        raise AdapterError(str(fault)) from fault
    faults = [f"{folder / RECORD}: {fault}" for fault in _strange(told)]
    if faults:
        raise AdapterError.all(faults)
    return Version(
        hash=told["version"],
        folder=folder,
        base=told["base"],
        trained=told["trained"],
        files=told["files"],
        data=told.get("data"),
        parent=told.get("parent"),
        merged_from=tuple(told.get("merged_from") or ()),
        notes=tuple(told.get("notes") or ()),
    )


def _strange(told: Mapping[str, Any]) -> list[str]:
    """What in a record is not what `Version.text` writes."""
    if told.get("schema_version") != SCHEMA_VERSION:
        found = str(told.get("schema_version"))[:20]
        return [f"schema_version is {found}, this Pennyweight reads {SCHEMA_VERSION}; update it"]
    files = told.get("files")
    fits = {
        "version": _is_hash(told.get("version")),
        "base": _is_plain(told.get("base")),
        "trained": _is_plain(told.get("trained")),
        "data": told.get("data") is None or _is_hash(told["data"]),
        "parent": told.get("parent") is None or _is_hash(told["parent"]),
        "merged_from": _all(told.get("merged_from"), _is_hash),
        "notes": _all(told.get("notes"), lambda note: isinstance(note, str)),
        "files": isinstance(files, dict)
        and set(files) <= set(KEPT)
        and {SETTINGS, TENSORS} <= set(files)
        and all(map(_is_hash, files.values())),
    }
    return [f"{key}: not what is written there" for key, good in fits.items() if not good]


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def _all(values: Any, fits: Any) -> bool:
    return values is None or (isinstance(values, list) and all(map(fits, values)))


def _is_plain(value: Any) -> bool:
    """A flat table of short texts and numbers."""
    return isinstance(value, dict) and all(
        inside is None
        or isinstance(inside, bool | int | float)
        or (isinstance(inside, str) and len(inside) < 1000)
        or (_short(inside) and isinstance(inside, list))
        for inside in value.values()
    )


def _short(values: Iterable[Any]) -> bool:
    return _all(values, lambda each: isinstance(each, str) and len(each) < 1000)


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
