"""What shapes a run's prepared data, as text: it makes the name under which they are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pennyweight.data import dataset
from pennyweight.data.limits import LIMITS
from pennyweight.data.prepare.recipe import Recipe
from pennyweight.errors import DataError

__all__ = ["key_of", "made_of", "refuse_changed", "settings_of"]

_VERSION = 5  # of what the cache holds; raised when rendering changes
_SHAPES_NO_IDS = {"train", "eval", "packing", "split_seed", *LIMITS}


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """All that shapes the ids: the content of the files, the settings, tokenizer and template."""
    config, tokenizer, held = recipe.config, recipe.tokenizer, recipe.held
    return {
        "version": _VERSION,
        "data": config.model_dump(mode="json", exclude=_SHAPES_NO_IDS),
        "train": [_said(source) for source in recipe.training],
        "eval": None if held is None else [_said(source) for source in held],
        "tokenizer": _tokenizer_sha256(tokenizer),
        "stop_id": recipe.stop_id,
        "seed": recipe.seed,
        "surface": _surface_text(recipe),
    }


def key_of(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def made_of(settings: dict[str, Any]) -> dict[str, str]:
    parts = {
        " ".join(filter(None, (part, said["source"]["path"], said["source"]["split"]))): said[
            "sha256"
        ]
        for part in ("train", "eval")
        for said in settings[part] or ()
    }
    rendering = json.dumps([settings[key] for key in ("version", "stop_id", "surface")])
    parts |= {"tokenizer": settings["tokenizer"]}
    parts |= {"rendering": hashlib.sha256(rendering.encode()).hexdigest()}
    return {name: digest[:16] for name, digest in parts.items()}


def refuse_changed(settings: dict[str, Any], recipe: Recipe) -> None:
    """What was read is what was hashed, or its name would stand for other rows."""
    _refuse_changed(settings["train"], recipe.training)
    _refuse_changed(settings["eval"] or [], recipe.held or ())


def _refuse_changed(said: list[dict[str, Any]], sources: Sequence[dataset.Located]) -> None:
    for before, located in zip(said, sources, strict=True):
        if _said(located) != before:
            raise DataError(
                f"{located.source.path}: changed while it was read; run the same command again "
                "once nothing writes to it"
            )


def _said(place: dataset.Located) -> dict[str, Any]:
    return {
        "source": place.source.model_dump(mode="json"),
        "format": place.format,
        "sha256": dataset.content_sha256(place),
    }


def _surface_text(recipe: Recipe) -> str:
    """What a template file says, and the day where a template prints it."""
    template = recipe.config.template
    own = getattr(recipe.tokenizer, "chat_template", None)
    text = json.dumps(own) if template in {"auto", "tokenizer"} else ""
    if template not in {"auto", "tokenizer", "plain", "turns", "chatml"}:
        path = Path(template)
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if "strftime_now" in text:
        text += recipe.day
    return text


def _tokenizer_sha256(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(tokenizer)
    specials = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()})
    return hashlib.sha256((text + specials).encode()).hexdigest()
