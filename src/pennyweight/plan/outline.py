"""A model's shapes by its name, by the shortest way: `config.json` alone where that says it all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pennyweight.foreign import ForeignError, file_in, is_folder, read_json
from pennyweight.shapes import Shapes, is_hub_id, shapes_of_config, size_faults

__all__ = ["hub_cache", "is_here", "shapes_of"]


def shapes_of(model: str) -> Shapes:
    """Shapes of a model (an id, `id@revision`, a folder, `builtin`); fetches at most small files.

    ModelError for what is no model, or one that asks to run code.
    """
    folder = _folder(model)
    if folder is not None:
        try:
            raw = read_json(file_in(folder, "config.json"))
        except (OSError, ForeignError):
            raw = {}  # the model room says what is wrong with it
        found = None if size_faults(raw) else shapes_of_config(model, raw)
        if found is not None:
            return found
    from pennyweight.model import shapes

    return shapes(model)


def is_here(model: str) -> bool:
    """Its weights are a folder, ship with the package, or stand in the Hub's cache."""
    folder = _folder(model)
    return folder is not None and any(folder.glob("*.safetensors"))


def hub_cache() -> Path:
    """Where downloads of the Hub go."""
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()


def _folder(model: str) -> Path | None:
    """The model's folder if it is on this machine."""
    if model == "builtin":
        from pennyweight.builtin import model_folder

        return model_folder()
    if is_folder(model):
        return Path(model)
    if not is_hub_id(model):
        return None
    name, _, revision = model.partition("@")
    repository = hub_cache() / f"models--{name.replace('/', '--')}"
    commit = revision or "main"
    with contextlib.suppress(OSError):  # a commit rather than a branch, or nothing here
        commit = (repository / "refs" / commit).read_text(encoding="utf-8").strip()
    snapshot = repository / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None
