"""An adapter on its way into the registry: found, copied, read strictly, and put on record."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pennyweight.errors import AdapterError, ConfigError
from pennyweight.foreign import ForeignError, file_in
from pennyweight.registry.record import HASH, KEPT, RECORD, SETTINGS, Version, sha256_of

__all__ = ["adapter_folder", "copied", "recorded"]


def adapter_folder(source: Path) -> Path:
    """The folder in PEFT's layout that `source` is, or that a run left in it."""
    if (source / SETTINGS).is_file():
        return source
    if (source / "adapter" / SETTINGS).is_file():
        return source / "adapter"
    if (source / "config.json").is_file():
        raise ConfigError(
            f"{source}: no adapter there: either the run has not finished (`pennyweight train` with the "
            "same description resumes it), or it trained the whole model"
        )
    raise ConfigError(
        f"{source}: neither a run's folder nor an adapter's; an adapter's has {SETTINGS}"
    )


def copied(source: Path, folder: Path) -> list[str]:
    """Copy the files of an adapter byte for byte; gives the names of others that were left."""
    for name in KEPT:
        try:
            shutil.copyfile(file_in(source, name), folder / name)
        except FileNotFoundError:
            continue
        except ForeignError as fault:
            raise AdapterError(str(fault)) from fault
    kept = {*KEPT, RECORD}
    return sorted(p.name for p in source.iterdir() if p.name not in kept and p.name[0] != ".")


def recorded(
    folder: Path,
    told: Version | None,
    parent: str | None,
    merged_from: tuple[str, ...],
    left: list[str],
) -> Version:
    """Read the adapter strictly, hold it against the record it came with, and write its record."""
    from pennyweight.lora import Adapter, content_hash

    adapter = Adapter.load(folder)
    files = {name: sha256_of(folder / name) for name in KEPT if (folder / name).is_file()}
    mark = content_hash(adapter)
    if told is not None:
        _hold_against(told, mark, files)
    notes = [*adapter.notes]
    if left:
        shown = ", ".join(name[:60] for name in left[:6]) + (", …" if len(left) > 6 else "")
        notes.append(f"left where it was: {shown}")
    version = Version(
        hash=mark,
        folder=folder,
        base={
            "name": adapter.base_name[:900],
            "fingerprint": adapter.base_fingerprint,
            "quantization": _text(adapter.about.get("base_quantization")),
        },
        trained={
            "r": adapter.config.r,
            "lora_alpha": adapter.config.lora_alpha,
            "use_rslora": adapter.config.use_rslora,
            "parameters": adapter.parameters,
            "modules": len(adapter.factors),
            "whole": sorted(adapter.saved)[:20],
        },
        files=files,
        parent=parent or (told.parent if told else None),
        merged_from=merged_from or (told.merged_from if told else ()),
        notes=tuple(notes),
    )
    data = (version.receipt() or {}).get("data")
    rows = _text(data.get("fingerprint")) if isinstance(data, Mapping) else None
    if rows and HASH.fullmatch(rows):
        version = replace(version, data=rows)
    (folder / RECORD).write_text(version.text(), encoding="utf-8")
    return version


def _text(value: Any) -> str | None:
    return value[:900] if isinstance(value, str) else None


def _hold_against(told: Version, mark: str, files: Mapping[str, str]) -> None:
    """AdapterError where an adapter is not what its own record says."""
    wrong = [name for name, kept in told.files.items() if files.get(name) != kept]
    if told.hash != mark:
        wrong.append(f"the version is {mark}, its record says {told.hash}")
    if wrong:
        raise AdapterError(
            f"{told.folder}: not what was kept: {', '.join(wrong)}; it was changed or cut short on its "
            "way: fetch it again, or delete its version.json if the change is yours"
        )
