"""A model's shapes by its name, by the shortest way: `config.json` alone where that says it all."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from pennyweight.shapes import Shapes, shapes_of_config

__all__ = ["is_here", "shapes_of"]


def shapes_of(model: str) -> Shapes:
    """Shapes of a model (an id, `id@revision`, a folder, `builtin`); fetches at most small files.

    ModelError for what is no model, or one that asks to run code.
    """
    folder = _folder(model)
    if folder is not None:
        try:
            raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raw = None  # the model room says what is wrong with it
        found = shapes_of_config(model, raw) if isinstance(raw, dict) else None
        if found is not None:
            return found
    from pennyweight.model import shapes

    return shapes(model)


def is_here(model: str) -> bool:
    """Its weights are a folder, ship with the package, or stand in the Hub's cache."""
    folder = _folder(model)
    return folder is not None and any(folder.glob("*.safetensors"))


def _folder(model: str) -> Path | None:
    """The model's folder if it is on this machine."""
    if model == "builtin":
        from pennyweight.builtin import model_folder

        return model_folder()
    if Path(model).is_dir():
        return Path(model)
    name, _, revision = model.partition("@")
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = revision or "main"
    with contextlib.suppress(OSError):  # a commit rather than a branch, or nothing here
        commit = (repository / "refs" / commit).read_text(encoding="utf-8").strip()
    snapshot = repository / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None
