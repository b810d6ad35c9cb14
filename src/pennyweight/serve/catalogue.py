"""Who may ask which model: names, the versions they stand for, and folders that bring their own.

A name is an alias: it is found for the key that owns it, or for everyone, and read once for each
request; what it stands for then is an immutable version.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pennyweight.errors import AdapterError, PennyweightError
from pennyweight.lora import check_name
from pennyweight.registry import Registry
from pennyweight.serve.records import EVERYONE, ModelRecord
from pennyweight.serve.refusals import Refused, absent, invalid, one_line
from pennyweight.serve.store import Store
from pennyweight.serve.versions import Versions

__all__ = ["Catalogue", "Served", "is_model_id"]

SETTINGS = "adapter_config.json"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,299}")


def is_model_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Served:
    """A model that may be asked. `version` None: the bare base."""

    id: str
    created_at: int
    version: str | None = None
    parent: str | None = None
    owner: str = EVERYONE


class Catalogue:
    """The base under its id, and every name there is.

    `allowed`: folders from which a request may load. `fits` raises AdapterError for a version that
    is not of this base.
    """

    def __init__(
        self,
        store: Store,
        versions: Versions,
        *,
        base_id: str,
        allowed: tuple[Path, ...],
        fits: Callable[[str], object],
    ) -> None:
        self._store, self._versions, self._fits = store, versions, fits
        self.base_id = base_id
        self._allowed = tuple(folder.resolve() for folder in allowed)
        self._began = int(time.time())

    @property
    def base(self) -> Served:
        return Served(self.base_id, self._began)

    def get(self, owner: str, named: str, *, param: str | None = None) -> Served:
        """Refused (404) where there is none, or another key's."""
        if named == self.base_id:
            return self.base
        found = self._store.get(ModelRecord, named, owner) if is_model_id(named) else None
        if found is None or found.parent != self.base_id:
            raise absent("model", named, param=param)
        return _served(found)

    def listed(self, owner: str) -> list[Served]:
        """The base, and behind it every name the key may ask, oldest first."""
        names = self._store.all(ModelRecord, {"owner": (owner, EVERYONE), "parent": self.base_id})
        return [self.base, *(_served(each) for each in names)]

    def delete(self, owner: str, named: str) -> None:
        """Forget one of the key's own names. What is being answered is answered to its end."""
        found = self.get(owner, named)
        if found.owner != owner:
            raise Refused(
                403, f"{named}: not yours to delete", kind="permission_error", code="not_yours"
            )
        self._store.delete_model(named, owner)

    def load(self, owner: str, name: str, path: str) -> ModelRecord:
        """Let the adapter in a folder be asked by this name, as vLLM's route does."""
        try:
            check_name(name)
        except AdapterError as fault:
            raise invalid(str(fault), param="lora_name") from None
        folder = self._folder(path)
        try:
            version = self._versions.keep_folder(folder)
            self._fits(version)
        except PennyweightError as fault:
            said = one_line(str(fault)).replace(f"{folder}/", "").replace(str(folder), name)
            raise invalid(f"{name}: {said}", param="lora_path", code="invalid_adapter") from None
        made = ModelRecord(name, owner, int(time.time()), version, self.base_id)
        taken = name == self.base_id or self._store.get(ModelRecord, name, owner) is not None
        if taken or not self._store.name_model(made):
            raise invalid(f"{name}: this name is taken", param="lora_name", code="name_taken")
        return made

    def unload(self, owner: str, name: str) -> None:
        if not self._store.delete_model(name, owner):
            raise absent("model", name, param="lora_name")

    def read_folder(self, folder: Path) -> list[str]:
        """Serve each adapter of a folder to everyone, by the name of its own folder; what was passed
        over, a line each. Of a registry each name is served, and each tag as `name@tag`. A name that
        was served before stands for what is there now.
        """
        faults = []
        for record in self._store.all(ModelRecord, {"owner": EVERYONE}):
            self._store.delete_model(record.id, EVERYONE)
        for name, place in _adapters_in(folder):
            try:
                check_name(name.partition("@")[0])
                version = self._versions.keep_folder(place)
                self._fits(version)
            except PennyweightError as fault:
                faults.append(f"{name}: not served: {one_line(str(fault))}")
                continue
            made = ModelRecord(name, EVERYONE, int(time.time()), version, self.base_id)
            if name == self.base_id or not self._store.name_model(made):
                faults.append(f"{name}: not served: the name is taken")
        return faults

    def _folder(self, path: str) -> Path:
        """The folder of that path, if it lies under one that the operator allowed."""
        asked = Path(path)
        found = [asked] if asked.is_absolute() else [root / asked for root in self._allowed]
        for each in found:
            try:
                real = each.resolve()
            except (OSError, ValueError, RuntimeError):
                continue
            inside = any(real != root and real.is_relative_to(root) for root in self._allowed)
            if inside and real.is_dir():
                return real
        raise Refused(
            403,
            "lora_path: adapters are loaded only from folders that the server allows "
            "(`adapters`, `load_from`), and no such folder is there",
            kind="permission_error",
            param="lora_path",
            code="path_not_allowed",
        )


def _adapters_in(folder: Path) -> list[tuple[str, Path]]:
    """Names and folders of the adapters there: a registry's, a run's, or folders in PEFT's layout."""
    if (folder / "names").is_dir() and (folder / "versions").is_dir():
        kept = Registry(folder)
        found = []
        for name in kept.names():
            for tag, version in kept.tags(name).items():
                named = name if tag == "latest" else f"{name}@{tag}"
                found.append((named, folder / "versions" / version))
        return found
    places = sorted(folder.iterdir()) if folder.is_dir() else []
    inside = [
        (p.name, p / "adapter" if (p / "adapter" / SETTINGS).is_file() else p) for p in places
    ]
    return [(name, place) for name, place in inside if (place / SETTINGS).is_file()]


def _served(record: ModelRecord) -> Served:
    return Served(record.id, record.created_at, record.version, record.parent, record.owner)
