"""Files of rows as they are uploaded: written whole, owned by a key, gone when nobody needs them."""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from pennyweight.files import disk_faults, make_folder, whole
from pennyweight.serve.records import FileRecord
from pennyweight.serve.refusals import absent, invalid
from pennyweight.serve.store import Store

__all__ = ["PURPOSES", "Uploads", "safe_name"]

PURPOSES = ("fine-tune",)
RESULTS = "fine-tune-results"
_ID = re.compile(r"file-[0-9a-f]{24}")
_BLOCK = 1 << 20


@runtime_checkable
class Readable(Protocol):
    """Bytes, a block at a time."""

    def read(self, size: int, /) -> bytes: ...


class Uploads:
    """The files of all keys, below one folder."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder
        make_folder(folder)

    def create(self, owner: str, filename: str, purpose: str, content: Readable) -> FileRecord:
        """Keep an upload; it is on the disk before it is acknowledged."""
        if purpose not in PURPOSES:
            raise invalid(
                f"purpose {purpose[:40]!r}: files are for {', '.join(PURPOSES)} here",
                param="purpose",
            )
        return self._keep(owner, filename, purpose, content)

    def keep_results(self, owner: str, filename: str, content: Readable) -> FileRecord:
        """A file that the server made for the key."""
        return self._keep(owner, filename, RESULTS, content)

    def get(self, owner: str, file_id: str, *, param: str | None = None) -> FileRecord:
        """Refused (404) where it is not the owner's, or deleted."""
        found = self._store.get(FileRecord, file_id, owner) if _ID.fullmatch(file_id) else None
        if found is None or found.deleted:
            raise absent("file", file_id, param=param)
        return found

    def path(self, file: FileRecord) -> Path:
        return self._folder / file.path

    def blocks(self, file: FileRecord) -> Iterator[bytes]:
        """The bytes as they were uploaded."""
        with self.path(file).open("rb") as content:
            while block := content.read(_BLOCK):
                yield block

    def delete(self, owner: str, file_id: str) -> None:
        """Take it from its owner; the bytes go once no job needs them."""
        self.get(owner, file_id)
        self._store.delete_file(file_id, owner)
        self.sweep()

    def sweep(self) -> None:
        """Remove the bytes of deleted files, but for those that a job still reads."""
        needed = self._store.files_in_use()
        for file in self._store.all(FileRecord, {"deleted": 1}):
            if file.id not in needed:
                shutil.rmtree(self.path(file).parent, ignore_errors=True)
                self._store.forget_file(file.id)

    def tidy(self) -> None:
        """Remove what a killed server had begun to write, and what `sweep` does."""
        known = {file.id for file in self._store.all(FileRecord, {})}
        for folder in self._folder.iterdir():
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
        self.sweep()

    def _keep(self, owner: str, filename: str, purpose: str, content: Readable) -> FileRecord:
        made = f"file-{secrets.token_hex(12)}"
        name = safe_name(filename)
        folder = self._folder / made
        digest, size = hashlib.sha256(), 0
        try:
            with disk_faults(folder, "free some space"):
                make_folder(folder)
                with whole(folder / name) as partial, partial.open("wb") as file:
                    while block := content.read(_BLOCK):
                        digest.update(block)
                        size += len(block)
                        file.write(block)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        record = FileRecord(
            id=made,
            owner=owner,
            filename=_shown(filename),
            purpose=purpose,
            bytes=size,
            sha256=digest.hexdigest(),
            created_at=int(time.time()),
            path=f"{made}/{name}",
        )
        kept: FileRecord = self._store.add(record)
        return kept


def safe_name(filename: str) -> str:
    """A name for the disk that nothing but a name can come of; errors in rows name it.

    >>> safe_name("../../etc/My rows.txt")
    'My_rows.txt.jsonl'
    """
    last = re.split(r"[/\\]", filename)[-1]
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", last).lstrip(".")[:80] or "rows"
    if plain.lower().endswith((".jsonl", ".csv")):
        return plain
    return f"{plain}.jsonl"


def _shown(filename: str) -> str:
    return "".join(c for c in filename if c.isprintable())[:200] or "rows.jsonl"
