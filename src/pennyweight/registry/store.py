"""The registry: a folder of adapters by version, with names that point at them.

versions/<sha256>/          an adapter in PEFT's layout and its `version.json`; never changed
names/<name>/versions/...   one file a version that bears the name: when it was added
names/<name>/tags/<tag>     the version a tag points at; moved by one rename

A reference is `name` (its `latest`), `name@tag`, `name@version` or `version`, where a version may be
cut to six digits or more.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pennyweight.errors import AdapterError, DiskError
from pennyweight.files import disk_faults, make_folder, sync, whole
from pennyweight.registry.intake import adapter_folder, copied, recorded
from pennyweight.registry.record import HASH, Version, read_version

__all__ = ["ENVIRONMENT", "Entry", "Registry", "default_folder"]

ENVIRONMENT = "PENNYWEIGHT_REGISTRY"
LATEST = "latest"
INCOMING = ".incoming-"
STALE_SECONDS = 86_400
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGITS = re.compile(r"[0-9a-f]{6,64}")


def default_folder() -> Path:
    """What PENNYWEIGHT_REGISTRY names, or `pennyweight/adapters` where this system keeps a user's data."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named).expanduser()
    if sys.platform == "win32":
        data = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        data = Path.home() / "Library" / "Application Support"
    else:
        data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return data / "pennyweight" / "adapters"


@dataclass(frozen=True, slots=True)
class Entry:
    """A version under a name: when it came there, and the tags that point at it."""

    name: str
    version: Version
    added_at: str
    tags: tuple[str, ...]


class Registry:
    """The adapters kept in one folder; several processes may use it at once.

    Nothing outside the folder is ever written, and a version only appears whole.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()

    def add(
        self,
        source: Path | str,
        *,
        name: str,
        tags: Iterable[str] = (),
        parent: str | None = None,
        merged_from: Iterable[str] = (),
        expect: str | None = None,
    ) -> Version:
        """Keep the adapter of a run's folder or of a folder in PEFT's layout, and call it `name`.

        It becomes the name's `latest`. `parent` and `merged_from` are references to versions kept
        here. AdapterError where it is no sound adapter, or not the version that is `expect`ed.
        """
        name, tags = check_name(name), [check_tag(tag) for tag in tags]
        forebears = (
            None if parent is None else self.resolve(parent).hash,
            tuple(self.resolve(each).hash for each in merged_from),
        )
        adapter = adapter_folder(Path(source))
        with disk_faults(self.folder, "free some space, or name another registry"):
            make_folder(self.folder / "versions")
            version = self._keep(adapter, *forebears, expect)
            self._put(name, version, tags)
        return version

    def names(self) -> list[str]:
        """Names in use, in order."""
        found = self.folder / "names"
        return sorted(p.name for p in _folders(found) if _NAME.fullmatch(p.name))

    def entries(self, name: str | None = None) -> list[Entry]:
        """Every version of a name, or of all names, the newest of each first."""
        found = []
        for each in self.names() if name is None else [self._known(name)]:
            tags = self.tags(each)
            listed = (self.folder / "names" / each / "versions").glob("[!.]*")
            rows = [
                Entry(
                    each,
                    self._version(path.name),
                    path.read_text(encoding="utf-8").strip()[:40],
                    tuple(tag for tag, mark in tags.items() if mark == path.name),
                )
                for path in listed
                if HASH.fullmatch(path.name)
            ]
            found += sorted(rows, key=lambda row: (row.added_at, row.tags), reverse=True)
        return found

    def tags(self, name: str) -> dict[str, str]:
        """The tags of a name, each with the version it points at."""
        folder = self.folder / "names" / self._known(name) / "tags"
        found = {
            path.name: path.read_text(encoding="utf-8").strip()
            for path in sorted(folder.glob("[!.]*"))
            if _NAME.fullmatch(path.name)
        }
        return {tag: mark for tag, mark in found.items() if HASH.fullmatch(mark)}

    def resolve(self, reference: str) -> Version:
        """The version a reference means; AdapterError names what is there instead."""
        name, _, which = reference.partition("@")
        if not which and _DIGITS.fullmatch(name) and name not in self.names():
            return self._version(self._completed(name, self._hashes(), reference))
        tags = self.tags(name)
        if which in tags or not which:
            if (which or LATEST) not in tags:
                raise AdapterError(
                    f"{name}: no version is tagged {LATEST}; name one: {name}@VERSION"
                )
            return self._version(tags[which or LATEST])
        if not _DIGITS.fullmatch(which):
            known = ", ".join(tags) or "none"
            raise AdapterError(f"{name}: no tag {which[:80]!r}; its tags are: {known}")
        kept = [entry.version.hash for entry in self.entries(name)]
        return self._version(self._completed(which, kept, reference))

    def tag(self, reference: str, tag: str) -> Version:
        """Point `name@tag` at the version `reference` means; the tag moves in one step."""
        version, tag = self.resolve(reference), check_tag(tag)
        name = reference.partition("@")[0]
        if name not in self.names():
            raise AdapterError(f"{reference}: a tag belongs to a name; write NAME@VERSION")
        self._point(name, tag, version)
        return version

    def untag(self, name: str, tag: str) -> None:
        """Take a tag away; the version stays."""
        if tag not in (known := self.tags(name)):
            raise AdapterError(
                f"{name}: no tag {tag[:80]!r}; its tags are: {', '.join(known) or 'none'}"
            )
        (self.folder / "names" / name / "tags" / tag).unlink()

    def remove(self, reference: str) -> list[str]:
        """Take a name (`name`) or one version of it (`name@...`) away, and the files of versions that
        bear no name afterwards; gives the versions whose files are gone."""
        name, _, which = reference.partition("@")
        place = self.folder / "names" / self._known(name)
        if which:
            gone = [self.resolve(reference).hash]
            for tag, mark in self.tags(name).items():
                if mark in gone:
                    (place / "tags" / tag).unlink()
            (place / "versions" / gone[0]).unlink()
        else:
            gone = [entry.version.hash for entry in self.entries(name)]
        if not which or not any((place / "versions").glob("[!.]*")):
            shutil.rmtree(place)
        still = {entry.version.hash for entry in self.entries()}
        unused = [mark for mark in gone if mark not in still]
        for mark in unused:
            # Out of sight in one step: nobody finds half a version.
            leaving = self.folder / "versions" / f"{INCOMING}{mark}-removed"
            (self.folder / "versions" / mark).rename(leaving)
            shutil.rmtree(leaving)
        return unused

    def lineage(self, version: Version) -> list[Version]:
        """The version, its parent, and so on, as far as they are kept here."""
        line = [version]
        while (parent := line[-1].parent) and parent not in {each.hash for each in line}:
            if not (self.folder / "versions" / parent).is_dir():
                break
            line.append(self._version(parent))
        return line

    def names_of(self, version: Version) -> list[str]:
        """How a version is called here: `name@tag`, or `name@digits` where no tag points at it."""
        rows = [entry for entry in self.entries() if entry.version.hash == version.hash]
        return [f"{row.name}@{tag}" for row in rows for tag in row.tags or (version.short,)]

    def _keep(
        self, adapter: Path, parent: str | None, merged_from: tuple[str, ...], expect: str | None
    ) -> Version:
        """Copy, check the copy, and give it its place; what is there already stays as it is."""
        self._sweep()
        incoming = Path(tempfile.mkdtemp(prefix=INCOMING, dir=self.folder / "versions"))
        try:
            left = copied(adapter, incoming)
            version = recorded(incoming, read_version(adapter), parent, merged_from, left)
            if expect is not None and not version.hash.startswith(expect):
                raise AdapterError(
                    f"{adapter}: holds version {version.hash}, and {expect} was expected; "
                    "it is not what was pushed"
                )
            place = self.folder / "versions" / version.hash
            if not place.is_dir():
                for path in (*incoming.iterdir(), incoming):
                    sync(path)
                with suppress(FileExistsError):  # another process was quicker with the same bytes
                    incoming.rename(place)
                sync(place.parent)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)
        return self._version(version.hash)

    def _put(self, name: str, version: Version, tags: Iterable[str]) -> None:
        place = self.folder / "names" / name / "versions"
        make_folder(place)
        if not (place / version.hash).exists():
            with whole(place / version.hash) as partial:
                partial.write_text(datetime.now(UTC).isoformat(timespec="microseconds") + "\n")
        for tag in dict.fromkeys((*tags, LATEST)):
            self._point(name, tag, version)

    def _point(self, name: str, tag: str, version: Version) -> None:
        place = self.folder / "names" / name / "tags"
        with disk_faults(place, "the tag points where it did"):
            make_folder(place)
            with whole(place / tag) as partial:
                partial.write_text(version.hash + "\n", encoding="utf-8")

    def _version(self, mark: str) -> Version:
        found = read_version(self.folder / "versions" / mark)
        if found is None or found.hash != mark:
            raise DiskError(
                f"{self.folder / 'versions' / mark}: missing or not what was kept there; "
                "remove the name that points at it, or pull it again"
            )
        return found

    def _hashes(self) -> list[str]:
        return [p.name for p in _folders(self.folder / "versions") if HASH.fullmatch(p.name)]

    def _completed(self, digits: str, kept: Iterable[str], reference: str) -> str:
        found = [mark for mark in kept if mark.startswith(digits)]
        if len(found) != 1:
            many = "several versions begin" if found else "no version begins"
            raise AdapterError(f"{reference[:80]}: {many} with {digits} in {self.folder}")
        return found[0]

    def _known(self, name: str) -> str:
        """The name if it is in use; AdapterError with those that are."""
        names = self.names()
        if name not in names:
            known = ", ".join(names[:20]) or "none yet; `pennyweight adapters add` keeps one"
            raise AdapterError(
                f"{name[:80]!r}: no adapter of that name in {self.folder}; names: {known}"
            )
        return name

    def _sweep(self) -> None:
        """Drop what a process that was killed while adding left behind."""
        for path in (self.folder / "versions").glob(f"{INCOMING}*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def check_name(name: str) -> str:
    """The name if it may name an adapter; AdapterError says how names look."""
    if not _NAME.fullmatch(name):
        raise AdapterError(
            f"adapter name {name[:80]!r}: names start with a-z or 0-9 and go on with a-z, 0-9, '.', "
            "'_' or '-', 64 characters at most"
        )
    return name


def check_tag(tag: str) -> str:
    """A tag is like a name, and not like the digits of a version."""
    if not _NAME.fullmatch(tag) or _DIGITS.fullmatch(tag):
        raise AdapterError(
            f"tag {tag[:80]!r}: tags are a-z, 0-9, '.', '_' and '-', 64 characters at most, and not "
            "six or more of 0-9 and a-f alone, which is how versions look"
        )
    return tag


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
