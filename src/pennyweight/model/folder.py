"""A model's folder: where it is, what files it has, and whether it may be trusted."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from pennyweight.errors import ModelError, PennyweightError
from pennyweight.foreign import (
    ForeignError,
    StoredTensor,
    file_in,
    is_folder,
    read_json,
    stored_tensors,
)
from pennyweight.model.tokenizer_file import check_tokenizer, panics_as_errors
from pennyweight.shapes import is_hub_id, size_faults

__all__ = [
    "find_folder",
    "fingerprint",
    "first_line",
    "license_of",
    "load_tokenizer",
    "read_config",
    "read_settings",
    "stored_weights",
    "weight_files",
]

READABLE = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)
INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9_][\w.-]*\.safetensors")
SAMPLE_BYTES = 4096
SAMPLES_PER_TENSOR = 16


def find_folder(name: str, *, weights: bool = True) -> Path:
    """The local folder of a model: `builtin`, a path, or a Hub snapshot (fetched if need be)."""
    if name == "builtin":
        from pennyweight.builtin import model_folder

        return model_folder()
    if is_folder(name):
        return Path(name)
    repo, _, revision = name.partition("@")
    if not is_hub_id(name):
        packed = name.lower().endswith(
            (".zip", ".tar", ".gz", ".tgz", ".7z", ".gguf", ".safetensors")
        )
        mend = "; unpack it, and name the folder" if packed else ""
        raise ModelError(
            f"base.model {name[:200]!r}: no such folder, and not a Hugging Face id of the form "
            f"owner/name{mend}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [p for p in READABLE if weights or "safetensors" not in p]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as fault:
        raise ModelError(
            f"base.model {name!r}: not found as a folder, and the Hub did not give it ({first_line(fault)}); "
            "check the name, the network, and HF_TOKEN for gated models"
        ) from fault


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json as it stands there; refused where it asks to run code, or for absurd sizes."""
    try:
        settings = read_json(file_in(folder, "config.json"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder}: no config.json there; name a Hugging Face model folder or id"
        ) from None
    except ForeignError as fault:
        raise ModelError(str(fault)) from fault
    path = folder / "config.json"
    faults = [*_code_in(settings), *size_faults(settings)]
    faults += [
        f"`{key[:60]}` is the name of a function of transformers' own, not a setting"
        for key in settings
        if callable(getattr(PretrainedConfig, key, None))
    ]
    if faults:
        raise ModelError.all(f"{path}: {fault}" for fault in faults[:10])
    return settings


def _code_in(settings: Mapping[str, Any], inside: str = "") -> list[str]:
    """What of a config.json would make transformers run code that is not its own."""
    faults = []
    for key, value in settings.items():
        here = f"{inside}{key}"[:80]
        if key == "auto_map" or (key == "trust_remote_code" and value):
            faults.append(
                f"`{here}` asks to run code from the model's folder, which Pennyweight never does; "
                "use a model that transformers has built in, or delete the key if it has"
            )
        elif key.strip("_").endswith("_implementation") and "/" in str(value):
            faults.append(
                f"`{here}` names {str(value)[:60]!r}, code to fetch from the Hub; delete the key"
            )
        elif key == "quantization_config" and inside:
            faults.append(f"`{here}`: only the whole model's storage is read; delete the key")
        elif isinstance(value, dict):
            faults += _code_in(value, f"{here}.")
    return faults


def read_config(folder: Path) -> PretrainedConfig:
    """The model's config.json as transformers has it; one that cannot be trusted is refused."""
    read_settings(folder)
    path = folder / "config.json"
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except PennyweightError:
        raise
    except Exception as fault:  # a stranger's values may trip any of the library's hundred classes
        raise ModelError(f"{path}: transformers cannot read it ({first_line(fault)})") from fault


def license_of(folder: Path) -> dict[str, str]:
    """What the front matter of the folder's model card says of its licence, as far as it says it.

    Keys: `license`, `license_name`, `license_link`; none where there is no card.
    """
    from huggingface_hub.repocard import metadata_load
    from yaml import YAMLError

    try:
        told = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, YAMLError):
        return {}
    fields = ("license", "license_name", "license_link")
    return {key: told[key] for key in fields if isinstance(told.get(key), str)}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside the model `name` (an id, `id@revision`, a folder, `builtin`)."""
    folder = find_folder(name, weights=False)
    if (folder / "config.json").exists():
        read_settings(folder)
    check_tokenizer(folder)
    try:
        with panics_as_errors():
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except PennyweightError:
        raise
    except Exception as fault:  # as above
        raise ModelError(
            f"{folder}: no tokenizer could be read ({first_line(fault)}); the folder needs tokenizer.json"
        ) from fault


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by its index where there is one."""
    try:
        if (folder / INDEX).exists():
            names = _indexed(folder)
        elif (folder / "model.safetensors").exists():
            names = ["model.safetensors"]
        else:
            found = sorted(folder.glob("model*.safetensors")) or sorted(
                folder.glob("*.safetensors")
            )
            names = [path.name for path in found]
        if not names:
            raise ModelError(
                f"{folder}: no .safetensors weights there; other formats can carry code and are not read"
            )
        return [file_in(folder, name) for name in names]
    except ForeignError as fault:
        raise ModelError(str(fault)) from fault
    except FileNotFoundError as fault:
        raise ModelError(
            f"{folder}: the index names {len(names)} files, missing: {Path(str(fault)).name}"
        ) from None


def _indexed(folder: Path) -> list[str]:
    index = folder / INDEX
    places = read_json(file_in(folder, INDEX)).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{index}: not a weight index; it has no weight_map")
    strange = [n for n in places.values() if not isinstance(n, str) or not _SHARD.fullmatch(n)]
    if strange:
        raise ModelError(
            f"{index}: names files outside its folder or of another kind: "
            f"{', '.join(str(n)[:60] for n in strange[:3])}; only .safetensors beside it are read"
        )
    return sorted(set(places.values()))


def stored_weights(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's files by name; a name in two files is refused."""
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        try:
            found = stored_tensors(path)
        except ForeignError as fault:
            raise ModelError(str(fault)) from fault
        if twice := next((name for name in found if name in stored), None):
            raise ModelError(f"{path}: {twice[:80]!r} is in another file too; keep one of them")
        stored |= found
    return stored


def fingerprint(folder: Path) -> str:
    """SHA-256 over every tensor's name, type and shape, and 16 evenly spaced 4 KiB samples of its bytes.

    Reads at most 64 KiB a tensor, so a large base takes well under a second; two trainings of one
    architecture differ in every weight they touched.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder):
        try:
            stored = stored_tensors(path)
        except ForeignError as fault:
            raise ModelError(str(fault)) from fault
        with path.open("rb") as file:
            for key, entry in stored.items():
                digest.update(f"{key}|{entry.dtype}|{list(entry.shape)}".encode())
                step = max(SAMPLE_BYTES, (entry.stop - entry.start) // SAMPLES_PER_TENSOR)
                for at in range(entry.start, entry.stop, step):
                    file.seek(at)
                    digest.update(file.read(min(SAMPLE_BYTES, entry.stop - at)))
    return digest.hexdigest()


def first_line(fault: BaseException) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0][:300]
