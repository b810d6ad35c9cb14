"""Whether a folder's tokenizer files may be read: no code, no paths, no text that grows without end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pennyweight.errors import ModelError
from pennyweight.foreign import ForeignError, file_in, read_json

__all__ = ["check_tokenizer", "panics_as_errors"]

TOKENIZER_LIMIT_BYTES = 256 * 2**20
GROWTH_LIMIT = 64
LARGEST_ID = 2**24


def check_tokenizer(folder: Path) -> None:
    """ModelError with what makes the tokenizer beside a model unfit to be read."""
    faults = []
    for name, check in (
        ("tokenizer_config.json", _setting_faults),
        ("tokenizer.json", _rule_faults),
    ):
        try:
            settings = read_json(file_in(folder, name), TOKENIZER_LIMIT_BYTES)
        except FileNotFoundError:
            continue
        except ForeignError as fault:
            raise ModelError(str(fault)) from fault
        faults += [f"{folder / name}: {fault}" for fault in check(settings, folder)]
    if faults:
        raise ModelError.all(faults[:10])


def _setting_faults(settings: dict[str, Any], folder: Path) -> list[str]:
    faults = []
    if "auto_map" in settings:
        faults.append(
            "`auto_map` asks to run code from the folder, which Pennyweight never does; delete the "
            "key if the folder has a tokenizer.json"
        )
    if settings.get("init_inputs"):
        faults.append("`init_inputs` hands values to the tokenizer unseen; delete the key")
    for key, value in settings.items():
        # Where its author had the file is often left in, and leads nowhere here.
        if key.endswith("_file") and isinstance(value, str) and _leads_out(value, folder):
            faults.append(
                f"`{key[:60]}` names a file outside the folder, {value[:80]!r}; delete it"
            )
    return faults


def _leads_out(value: str, folder: Path) -> bool:
    if "\0" in value:
        return True
    path = folder / value
    return path.exists() and not path.resolve().is_relative_to(folder.resolve())


def _rule_faults(rules: dict[str, Any], folder: Path) -> list[str]:
    faults = []
    if (growth := _growth(rules.get("normalizer"))) > GROWTH_LIMIT:
        faults.append(
            f"its normalizer makes text {growth:,.0f} times as long; no language needs that"
        )
    model, added = rules.get("model"), rules.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in added or [] if isinstance(token, dict)]
    if strange := next((i for i in ids if type(i) is not int or not 0 <= i < LARGEST_ID), None):
        faults.append(f"a token has the id {str(strange)[:40]}, which no vocabulary reaches")
    return faults


def _growth(normalizer: Any) -> float:
    """By how much the replacements of a normalizer, one after the other, can lengthen a text."""
    if not isinstance(normalizer, dict):
        return 1.0
    inner = normalizer.get("normalizers")
    if isinstance(inner, list):
        growth = 1.0
        for each in inner:
            growth *= _growth(each)
        return growth
    content, pattern = normalizer.get("content"), normalizer.get("pattern")
    if not isinstance(content, str):
        return 1.0
    old = pattern.get("String") if isinstance(pattern, dict) else None
    return max(1.0, len(content) / max(1, len(old) if isinstance(old, str) else 1))


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """The tokenizers library panics on some files, with what is no Exception."""
    try:
        yield
    except BaseException as fault:
        if type(fault).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library gave up: {fault}") from None
