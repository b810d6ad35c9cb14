"""Names from people and files that could become paths: taken only as [a-z0-9][a-z0-9._-]{0,63}."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from campaigns.tally import Tally
from campaigns.untrusted.watch import watching
from pennyweight.errors import ModelError, PennyweightError
from pennyweight.foreign import ForeignError, file_in, is_folder
from pennyweight.lora import check_name
from pennyweight.model import find_folder
from pennyweight.model.folder import weight_files
from pennyweight.shapes import is_hub_id

__all__ = ["run"]

FUZZED = 10_000
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_PIECES = (
    "..", "/", "\\", "a", "0", "-", "_", ".", "~", "%2e", "\0", "\n", " ", "C:", "con", "//", "etc", "passwd",
    "@", "A", "é", "\uff41", "\u202e", "a" * 64, "$HOME", "`id`", "|", "*", ".safetensors", "snapshots", "refs",
)  # fmt: skip

names = st.one_of(
    st.text(max_size=70),
    st.lists(st.sampled_from(_PIECES), max_size=6).map("".join),
    st.from_regex(NAME, fullmatch=True),
    st.from_regex(NAME, fullmatch=True).flatmap(
        lambda name: st.sampled_from(
            [name + "\n", "/" + name, name + "/..", name.upper(), name + "\0"]
        )
    ),
)


def run(tally: Tally, cases: int | None) -> None:
    (tally.folder / "inside").mkdir()
    (tally.folder / "outside.safetensors").write_bytes(b"secret")
    inside = tally.folder / "inside"
    inner = settings(
        max_examples=cases or FUZZED, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip

    @seed(0)
    @inner
    @given(name=names)
    def fuzz(name: str) -> None:
        tally.case(repr(name)[:60], _judge(name, inside))

    fuzz()


def _judge(name: str, inside: Path) -> str | None:
    with watching(inside) as watched:
        fault = (
            _as_adapter(name) or _as_shard(name, inside) or _as_file(name, inside) or _as_id(name)
        )
    return fault or ("; ".join(watched.seen[:2]) or None)


def _as_adapter(name: str) -> str | None:
    try:
        taken = check_name(name) == name
    except PennyweightError:
        taken = False
    return None if taken == (NAME.fullmatch(name) is not None) else f"as an adapter: {taken}"


def _as_shard(name: str, inside: Path) -> str | None:
    """A name in a model's index: a file of the folder, or refused."""
    import json

    _put(inside / "model.safetensors.index.json", json.dumps({"weight_map": {"w": name}}))
    try:
        found: Any = weight_files(inside)
    except ModelError:
        return None
    return None if all(_is_in(path, inside) for path in found) else f"as a shard: {found}"


def _put(path: Path, text: str) -> None:
    """Written past the watch, which is over the reading."""
    from campaigns.untrusted import watch

    held, watch._now = watch._now, None
    path.write_text(text)
    watch._now = held


def _as_file(name: str, inside: Path) -> str | None:
    try:
        path = file_in(inside, name)
    except (ForeignError, OSError, ValueError):
        return None
    return None if _is_in(path, inside) else f"as a file: {path}"


def _as_id(name: str) -> str | None:
    """As a model: a folder that is there, an id of the Hub (offline here), or refused."""
    if is_hub_id(name):
        return None if ".." not in name and not name.startswith(("/", "~")) else "as an id"
    here = is_folder(name)
    try:
        find_folder(name)
    except ModelError:
        return "a folder was refused" if here else None
    return None if here or name == "builtin" else "as a model"


def _is_in(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
