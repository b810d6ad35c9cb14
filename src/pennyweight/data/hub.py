"""Files of a dataset on the Hugging Face Hub: found by split, downloaded once, never executed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pennyweight.data.read import SUFFIXES, names_split, suffix_of
from pennyweight.errors import DataError

__all__ = ["chosen_files", "hub_files"]

_CONVERTED = "refs/convert/parquet"  # where the Hub keeps every public dataset as Parquet


def hub_files(name: str, split: str) -> tuple[list[Path], list[str]]:
    """Local paths of a split's files and how to call them in messages; downloads what is missing."""
    from huggingface_hub import HfApi, hf_hub_download  # the network is touched only here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    try:
        api = HfApi()
        found, at = _listed(api, repo, revision or None), revision or None
        chosen = chosen_files(found, split)
        if not chosen and not revision:
            found, at = _listed(api, repo, _CONVERTED), _CONVERTED
            chosen = chosen_files(found, split)
        if not chosen:
            raise DataError(
                f"{name}: no file of rows for split {split!r} among {len(found)} files; "
                "name a split the dataset has"
            )
        paths = [
            Path(hf_hub_download(repo, file, repo_type="dataset", revision=at)) for file in chosen
        ]
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise DataError(
            f"{name}: neither a file here nor a dataset that can be had from the Hub ({reason}); "
            "check the name, the network, and HF_TOKEN for private data"
        ) from error
    return paths, [f"{repo}/{file}" for file in chosen]


def _listed(api: Any, repo: str, revision: str | None) -> list[str]:
    files: list[str] = api.list_repo_files(repo, repo_type="dataset", revision=revision)
    return files


def chosen_files(files: list[str], split: str) -> list[str]:
    """The files of a split in one format, Parquet before all; all of them where none names a split."""
    rows = sorted(f for f in files if suffix_of(f) in SUFFIXES and suffix_of(f) not in {".md"})
    rows = [f for f in rows if not f.startswith(".") and not f.endswith("dataset_infos.json")]
    named = [f for f in rows if names_split(f, split)]
    if not named and split == "train":
        others = ("test", "valid", "validation", "dev", "eval")
        named = [f for f in rows if not any(names_split(f, other) for other in others)]
    for suffix in (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".txt"):
        if of_kind := [f for f in named if suffix_of(f) == suffix]:
            return of_kind
    return []
