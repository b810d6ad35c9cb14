"""What of a run may be shown to anyone: file names in place of paths, and no secret.

Receipts and model cards are published with the weights. A path tells who works where, a token
opens doors; both can stand in settings, in notes about files and in what an error said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pennyweight.config.schema import AdaptersConfig, RunConfig, Source

__all__ = ["is_hub_id", "named_paths", "public", "public_config", "public_name"]

HIDDEN = "[removed]"
_SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL", re.I)
_SHORTEST_SECRET = 8
_TOKENS = re.compile(
    r"\b(?:hf_\w{16,}|sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16})\b"
    # A key of Weights & Biases; after @ it is a commit.
    r"|(?<![\w@])[0-9a-f]{40}(?!\w)"
)
_LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
# From the root, from home or from a drive down to the last folder; never inside an address or a
# regular expression.
_FOLDERS = re.compile(
    r"(?<![\w:/.~\\*)\]-])(?:~?/(?:[^\s'\"`,;:|<>()\[\]{}\\/]+/)+"
    r"|[A-Za-z]:[\\/](?:[^\s'\"`,;:|<>()\[\]{}\\/]+[\\/])+)(?=[^\s\\/])"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:@[\w./-]+)?")


def public_name(named: str) -> str:
    """A model or data source as it may be named: a Hub id or `builtin` as it is, of a path its end.

    >>> public_name("Qwen/Qwen3-0.6B"), public_name("/home/jane/rows.jsonl")
    ('Qwen/Qwen3-0.6B', 'rows.jsonl')
    """
    return named if is_hub_id(named) else Path(named.rstrip("/\\").replace("\\", "/")).name


def is_hub_id(named: str) -> bool:
    """Whether it is `owner/name` and no file or folder here."""
    return _HUB_ID.fullmatch(named) is not None and not Path(named).expanduser().exists()


def public(value: Any, known: Mapping[str, str] | None = None) -> Any:
    """Plain values with every text in them made public: folders of paths, logins and secrets go.

    `known`: texts with what to write for them, such as `named_paths` gives.
    """
    if isinstance(value, str):
        return _public_text(value, known or {})
    if isinstance(value, Mapping):
        return {public(str(key), known): public(inside, known) for key, inside in value.items()}
    if isinstance(value, list | tuple):
        return [public(inside, known) for inside in value]
    return value


def named_paths(config: RunConfig) -> dict[str, str]:
    """Every path that the run's description names, with the name to show for it."""
    rows = [config.data.train, config.data.eval]
    listed = [each for one in rows for each in (one if isinstance(one, tuple) else (one,))]
    sources = [each.path if isinstance(each, Source) else each for each in listed if each]
    named = [config.base.model, *sources, config.data.template, config.output_dir]
    return {path: public_name(path) for path in named if public_name(path) != path}


def public_config(config: RunConfig) -> RunConfig:
    """The run's description as it may be shown: names for paths, no system message."""
    data = config.data
    shown: dict[str, Any] = {"train": _sources(data.train), "eval": _sources(data.eval)}
    if data.template not in ("auto", "plain", "turns", "chatml"):
        shown["template"] = public_name(data.template)
    if data.system is not None:
        shown["system"] = f"({len(data.system):,} characters, not shown)"
    return config.model_copy(
        update={
            "base": config.base.model_copy(update={"model": public_name(config.base.model)}),
            "data": data.model_copy(update=shown),
            "adapters": AdaptersConfig(),  # every adapter's own description is of it alone
            "output_dir": public_name(config.output_dir),
        }
    )


def _sources(rows: Any) -> Any:
    if isinstance(rows, tuple):
        return tuple(_sources(each) for each in rows)
    if isinstance(rows, Source):
        return rows.model_copy(update={"path": public_name(rows.path)})
    return rows if rows is None else public_name(rows)


def _public_text(text: str, known: Mapping[str, str]) -> str:
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    for path in sorted(known, key=len, reverse=True):
        text = text.replace(path, known[path])
    for folder in (str(Path.cwd()), str(Path.home())):
        if len(folder) > 1:
            text = text.replace(folder + os.sep, "")
    return _FOLDERS.sub("", _LOGIN.sub("", _TOKENS.sub(HIDDEN, text)))


def _secrets() -> list[str]:
    """Values of this process's environment that are named like secrets, longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if _SECRET_NAMES.search(name) and len(value) >= _SHORTEST_SECRET
    }
    return sorted(found, key=len, reverse=True)
