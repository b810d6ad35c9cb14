"""Adapters as they are served: folders in PEFT's layout that never change, named by their content.

A version holds the adapter, and how its training rendered text. What reads or caches a version goes
by its hash, so that one name's new adapter never meets another's keys and values.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pennyweight.data.chat import Renderer
from pennyweight.errors import AdapterError, DiskError
from pennyweight.files import make_folder, sync
from pennyweight.lora import Adapter
from pennyweight.runs import RunFolder
from pennyweight.runs.dressing import EXPORTED

__all__ = ["Rendering", "Versions", "rendering_of"]

RENDERING, TEMPLATE = "rendering.json", "template.jinja"
_HASHED = ("adapter_model.safetensors", "adapter_config.json", RENDERING, TEMPLATE)


@dataclass(frozen=True, slots=True)
class Rendering:
    """How an adapter was trained to read: a renderer's settings, the text of a template of its own,
    and whether its rows were prompts and completions.
    """

    settings: Mapping[str, Any]
    template: str | None = None
    completions: bool = False

    def renderer(self, tokenizer: Any, folder: Path) -> Renderer:
        settings = dict(self.settings)
        if self.template is not None:
            settings["template"] = str(folder / TEMPLATE)
        return Renderer(tokenizer, **settings)


def rendering_of(run: RunFolder) -> Rendering:
    """How the run renders, by what it kept."""
    held = run.read_held_out()
    settings = dict(held.rendering)
    template = run.path / settings["template"]
    text = template.read_text(encoding="utf-8") if settings["template"] == TEMPLATE else None
    kinds = {specimen.conversation.kind for specimen in held.specimens}
    return Rendering(settings, text, completions=kinds == {"prompt"})


class Versions:
    """The folder of all versions: `keep` one, find its folder by its hash, `sweep` those unnamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        make_folder(folder)
        for left in folder.glob(".keeping-*"):
            shutil.rmtree(left, ignore_errors=True)

    def path(self, version: str) -> Path:
        assert version.isalnum(), "a version is a hash"
        return self.folder / version

    def keep(self, adapter: Adapter, rendering: Rendering) -> str:
        """Write an adapter down, durable and whole; its version. The same again costs nothing."""
        with self._lock:
            partial = self.folder / ".keeping-one"
            shutil.rmtree(partial, ignore_errors=True)
            adapter.save(partial)
            return self._keep(partial, rendering)

    def keep_folder(self, folder: Path, rendering: Rendering | None = None) -> str:
        """The same for an adapter's folder, whose files are looked over first. AdapterError."""
        Adapter.load(folder)
        with self._lock:
            partial = self.folder / ".keeping-one"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            for file in sorted(folder.iterdir()):
                if file.is_file() and not file.is_symlink() and file.suffix in _COPIED:
                    shutil.copyfile(file, partial / file.name)
            return self._keep(partial, rendering or _told_beside(folder))

    def rendering(self, version: str) -> Rendering:
        folder = self.path(version)
        try:
            known = json.loads((folder / RENDERING).read_text(encoding="utf-8"))
            template = folder / TEMPLATE
            text = template.read_text(encoding="utf-8") if template.is_file() else None
            return Rendering(known["settings"], text, known["completions"])
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise DiskError(f"{folder}: not the version that was kept ({fault})") from fault

    def load(self, version: str) -> Adapter:
        """AdapterError where the files are not those that were kept."""
        folder = self.path(version)
        if not folder.is_dir() or _digest(folder) != version:
            raise AdapterError(
                f"adapter version {version[:12]}: its files are gone or were changed"
            )
        return Adapter.load(folder)

    def sweep(self, named: Iterable[str]) -> list[str]:
        """Remove versions that nothing names; their hashes."""
        kept = set(named)
        gone = [f.name for f in self.folder.iterdir() if f.is_dir() and f.name not in kept]
        for version in gone:
            shutil.rmtree(self.folder / version, ignore_errors=True)
        return gone

    def _keep(self, partial: Path, rendering: Rendering) -> str:
        known = {"settings": dict(rendering.settings), "completions": rendering.completions}
        (partial / RENDERING).write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        if rendering.template is not None:
            (partial / TEMPLATE).write_text(rendering.template, encoding="utf-8")
        version = _digest(partial)
        place = self.folder / version
        if place.is_dir():
            shutil.rmtree(partial)
            return version
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        partial.rename(place)
        sync(self.folder)
        return version


_COPIED = {".json", ".safetensors", ".jinja", ".md"}


def _told_beside(folder: Path) -> Rendering:
    """What an adapter's folder says of its rendering: a template of its own, else the base's."""
    if (folder.parent / "held_out").is_dir() and (folder.parent / "config.json").is_file():
        return rendering_of(RunFolder(folder.parent))
    template = folder / EXPORTED
    if template.is_file():
        return Rendering({"template": TEMPLATE}, template.read_text(encoding="utf-8"))
    return Rendering({})


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _HASHED:
        path = folder / name
        if path.is_file():
            with path.open("rb") as file:
                digest.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
