"""Checkpoints: a folder written whole or not at all, verified on reading; no pickle anywhere.

`step-000120/` holds `state.safetensors`, `progress.json` and `MANIFEST.json`, the size and SHA-256
of the other two. It is written beside its place under a hidden name, synced, and renamed; a kill at
any instant leaves either the whole folder or a hidden one that nobody reads and `tidy` removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pennyweight.errors import ConfigError, DiskError, DivergedError
from pennyweight.files import make_folder, mend, sync

__all__ = [
    "CheckpointState",
    "glimpse",
    "load_latest",
    "load_step",
    "require_same",
    "retire",
    "save",
    "steps_in",
    "tidy",
]

_TENSORS, _PROGRESS, _MANIFEST = "state.safetensors", "progress.json", "MANIFEST.json"
_FORMAT = 1
_NAMED = re.compile(r"(?:\.replaced-)?step-(\d+)")
_LEFT_BY_THE_DESKTOP = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+", re.I)
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointState:
    """All that a resumed run needs to go on to the bit.

    `tensors`: masters, optimizer state, random states. `progress`: counters, position, best metric,
    metric-log offset, versions; anything JSON can hold. `identity`: what must be the same for a
    resume to make sense, named as the reader should see it (`data`, `base`, `adapter.r`).
    """

    step: int
    tensors: dict[str, Tensor]
    progress: dict[str, Any]
    identity: dict[str, str]


def save(folder: Path, state: CheckpointState) -> Path:
    """Write the checkpoint of this step; when this returns it is durable. Gives its folder.

    DiskError: it could not be written; what was there before is untouched and nothing is left over.
    DivergedError: a tensor is not finite, and is not saved.
    """
    _check_finite(state)
    place = folder / f"step-{state.step:06d}"
    temporary = folder / f".saving-{place.name}"
    try:
        make_folder(folder)
        tidy(folder)
        temporary.mkdir()
        _write(temporary, state)
        if place.exists():
            place.rename(folder / f".replaced-{place.name}")
        temporary.rename(place)
        sync(folder)
    except (OSError, SafetensorError, DiskError) as fault:
        _remove(temporary)
        with contextlib.suppress(DiskError):
            tidy(folder)  # what was being replaced goes back to its place
        raise DiskError(_not_written(place, state, fault)) from fault
    _remove(folder / f".replaced-{place.name}")
    return place


def load_latest(folder: Path) -> tuple[CheckpointState, list[str]] | None:
    """The newest checkpoint whose manifest verifies, and why newer ones were passed over.

    None where there is none. DiskError: there are some, and none is whole.
    """
    passed_over: list[str] = []
    for place in _places(folder):
        try:
            return _read(place), passed_over
        except DiskError as fault:
            passed_over.append(str(fault))
    if passed_over:
        raise DiskError.all(
            [*passed_over, f"{folder}: no checkpoint is whole; delete the folder to begin anew"]
        )
    return None


def load_step(folder: Path, step: int) -> CheckpointState:
    """The checkpoint of one step; DiskError if it is not whole."""
    return _read(folder / f"step-{step:06d}")


def glimpse(folder: Path) -> dict[str, Any]:
    """The progress that the newest readable checkpoint tells, unverified; empty where there is none.

    For what all checkpoints of a run agree on and is needed before one can be taken up.
    """
    for place in _places(folder):
        try:
            progress: dict[str, Any] = json.loads((place / _PROGRESS).read_bytes())["progress"]
            return progress
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def retire(folder: Path, keep: int, best: int | None = None) -> list[Path]:
    """Remove all but the newest `keep` checkpoints, the one of step `best`, and the newest that
    verifies. Gives what was removed.
    """
    places = [place for place in _places(folder) if not place.name.startswith(".")]
    kept = {place.name for place in places[:keep]} | ({f"step-{best:06d}"} if best else set())
    kept |= {next((place.name for place in places if _verifies(place)), "")}
    removed = [place for place in places if place.name not in kept]
    for place in removed:
        going = folder / f".retired-{place.name}"
        try:
            place.rename(going)
        except OSError as fault:
            raise DiskError(
                f"{place}: could not be removed ({fault.strerror}); {mend(fault)}"
            ) from fault
        _remove(going)
    return removed


def tidy(folder: Path) -> list[str]:
    """Finish or remove what a killed save or retirement left; gives the names. Only for the folder's
    owner. DiskError: what was being replaced cannot be put back.
    """
    found = []
    for left in sorted(folder.glob(".*-step-*")) if folder.is_dir() else []:
        kind, _, name = left.name.partition("-")
        if kind == ".replaced" and not (folder / name).exists():
            try:
                left.rename(folder / name)
            except OSError as fault:
                raise DiskError(
                    f"{left}: cannot be put back ({fault.strerror}); mend the folder's rights"
                ) from fault
        elif kind in (".saving", ".replaced", ".retired"):
            _remove(left)
        else:
            continue
        found.append(left.name)
    return found


def steps_in(folder: Path) -> list[int]:
    """Steps that have a checkpoint here, newest first, verified or not."""
    return [_step_of(place) for place in _places(folder)]


def require_same(saved: Mapping[str, str], now: Mapping[str, str]) -> None:
    """ConfigError with every entry in which a checkpoint's identity differs from this run's."""
    faults = [
        f"{key}: the checkpoint was made with {saved.get(key, 'nothing')}, "
        f"this run has {now.get(key, 'nothing')}"
        for key in sorted(saved.keys() | now.keys())
        if saved.get(key) != now.get(key)
    ]
    if faults:
        faults.append(
            "a resumed run must be the same run: undo the change, or name another output_dir"
        )
        raise ConfigError.all(faults)


def _check_finite(state: CheckpointState) -> None:
    strange = [
        n for n, t in state.tensors.items() if t.is_floating_point() and not t.isfinite().all()
    ]
    if strange:
        raise DivergedError(
            f"step {state.step}: not saved, since NaN or infinity is in {', '.join(strange[:4])}"
        )


def _write(temporary: Path, state: CheckpointState) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    save_file(tensors, temporary / _TENSORS)
    sync(temporary / _TENSORS)
    progress = {"step": state.step, "progress": state.progress, "identity": state.identity}
    _write_bytes(temporary / _PROGRESS, _as_json(progress))
    files = {name: _measured(temporary / name) for name in (_TENSORS, _PROGRESS)}
    _write_bytes(temporary / _MANIFEST, _as_json({"format": _FORMAT, "files": files}))
    sync(temporary)


def _read(place: Path) -> CheckpointState:
    """DiskError names the first file that is not what was written."""
    _verify(place)
    try:
        record = json.loads((place / _PROGRESS).read_bytes())
        tensors = load_file(place / _TENSORS)
        state = CheckpointState(record["step"], tensors, record["progress"], record["identity"])
    except (OSError, ValueError, KeyError, SafetensorError) as fault:
        raise DiskError(f"{place}: not readable ({fault})") from fault
    if state.step != _step_of(place):
        raise DiskError(f"{place}: holds step {state.step}, so it was renamed or swapped")
    return state


def _verify(place: Path) -> None:
    try:
        beside = {path.name for path in place.iterdir()} - {_TENSORS, _PROGRESS, _MANIFEST}
        raw = (place / _MANIFEST).read_bytes()
        manifest = json.loads(raw)
        found = {name: _measured(place / name) for name in (_TENSORS, _PROGRESS)}
    except (OSError, ValueError) as fault:
        raise DiskError(f"{place}: not whole ({fault})") from fault
    if strange := sorted(name for name in beside if not _LEFT_BY_THE_DESKTOP.fullmatch(name)):
        raise DiskError(f"{place}: {', '.join(strange[:4])} was not written with it")
    # Compared as bytes, so that no flipped bit in the manifest itself goes unseen.
    if raw == _as_json({"format": _FORMAT, "files": found}):
        return
    if isinstance(manifest, dict) and isinstance(files := manifest.get("files"), dict):
        changed = [name for name in found if files.get(name) != found[name]]
        if changed:
            raise DiskError(f"{place}: {', '.join(changed)} differs from what was written")
    raise DiskError(f"{place}: {_MANIFEST} is not one this version wrote")


def _verifies(place: Path) -> bool:
    try:
        _verify(place)
    except DiskError:
        return False
    return True


def _places(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first; one that was being replaced comes after its replacement."""
    if not folder.is_dir():
        return []
    places = [p for p in folder.iterdir() if _NAMED.fullmatch(p.name) and p.is_dir()]
    return sorted(places, key=lambda p: (-_step_of(p), p.name.startswith(".")))


def _step_of(place: Path) -> int:
    return int(place.name.rpartition("-")[2])


def _measured(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)


def _remove(place: Path) -> None:
    """What cannot be removed now is removed by the next `tidy`."""
    shutil.rmtree(place, ignore_errors=True)


def _not_written(place: Path, state: CheckpointState, fault: Exception) -> str:
    size = sum(tensor.nbytes for tensor in state.tensors.values())
    reason = (fault.strerror if isinstance(fault, OSError) else None) or str(fault)
    whole: Iterable[int] = (step for step in steps_in(place.parent) if step != state.step)
    last = next((f"; the last one, of step {step}, is untouched" for step in whole), "")
    try:
        free = f", {shutil.disk_usage(place.parent).free / 1e6:,.1f} MB are free"
    except OSError:
        free = ""
    return (
        f"{place}: not written ({reason}); it needs {size / 1e6:,.1f} MB{free}{last}. "
        "Free some space or mend the folder, then run the same command again to resume"
    )
