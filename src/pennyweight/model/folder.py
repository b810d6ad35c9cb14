"""A model's folder: where it is, what files it has, and whether it may be trusted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from pennyweight.errors import ModelError

__all__ = [
    "find_folder",
    "fingerprint",
    "first_line",
    "load_tokenizer",
    "read_config",
    "weight_files",
]

READABLE = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
SAMPLE_BYTES = 4096
SAMPLES_PER_TENSOR = 16


def find_folder(name: str, *, weights: bool = True) -> Path:
    """The local folder of a model: `builtin`, a path, or a Hub snapshot (fetched if need be)."""
    if name == "builtin":
        from pennyweight.builtin import model_folder

        return model_folder()
    if Path(name).is_dir():
        return Path(name)
    repo, _, revision = name.partition("@")
    if repo.startswith((".", "/", "~")) or repo.count("/") != 1:
        raise ModelError(
            f"base.model {name!r}: no such folder, and not a Hugging Face id of the form owner/name"
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


def read_config(folder: Path) -> PretrainedConfig:
    """The model's config.json; one that asks to run code of its own is refused."""
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder}: no config.json there; name a Hugging Face model folder or id"
        ) from None
    except (OSError, ValueError) as fault:
        raise ModelError(f"{path}: not readable as JSON ({first_line(fault)})") from fault
    if not isinstance(raw, dict):
        raise ModelError(f"{path}: holds a {type(raw).__name__}, not a model's settings")
    if "auto_map" in raw:
        raise ModelError(
            f"{path}: `auto_map` asks to run code from the model's folder, which Pennyweight never does; "
            "use a model that transformers has built in, or delete the key if it has"
        )
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise ModelError(f"{path}: transformers cannot read it ({first_line(fault)})") from fault


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that stands beside the model `name` (an id, `id@revision`, a folder, `builtin`)."""
    folder = find_folder(name, weights=False)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as fault:
        raise ModelError(
            f"{folder}: no tokenizer could be read ({first_line(fault)}); the folder needs tokenizer.json"
        ) from fault


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by its index where there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"{folder}: no .safetensors weights there; other formats can carry code and are not read"
            )
        return files
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as fault:
        raise ModelError(f"{index}: not a weight index ({first_line(fault)})") from fault
    strange = [n for n in names if not isinstance(n, str) or Path(n).name != n or n.startswith(".")]
    if strange:
        raise ModelError(
            f"{index}: names files outside its folder: {', '.join(map(repr, strange[:3]))}"
        )
    missing = [n for n in names if not (folder / n).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: the index names {len(names)} files, missing: {', '.join(missing[:3])}"
        )
    return [folder / n for n in names]


def fingerprint(folder: Path) -> str:
    """SHA-256 over every tensor's name, type and shape, and 16 evenly spaced 4 KiB samples of its bytes.

    Reads at most 64 KiB a tensor, so a large base takes well under a second; two trainings of one
    architecture differ in every weight they touched.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder):
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
            for key in sorted(k for k in header if k != "__metadata__"):
                entry = header[key]
                digest.update(f"{key}|{entry['dtype']}|{entry['shape']}".encode())
                start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])
                step = max(SAMPLE_BYTES, (stop - start) // SAMPLES_PER_TENSOR)
                for at in range(start, min(stop, size), step):
                    file.seek(at)
                    digest.update(file.read(min(SAMPLE_BYTES, stop - at)))
    return digest.hexdigest()


def first_line(fault: BaseException) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0][:300]
