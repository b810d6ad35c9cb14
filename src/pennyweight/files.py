"""Files written whole or not at all, and what the disk refuses told apart from every other fault."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pennyweight.errors import DiskError

__all__ = ["disk_faults", "make_folder", "sync", "whole"]

# What a disk or a folder's rights refuse. A network's faults are OSErrors too, and not these.
_NAMES = "ENOSPC EDQUOT EFBIG EROFS EIO EACCES EPERM ESTALE"
_OF_THE_DISK = {getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name)}
_NUMBERED = re.compile(r"\(os error (\d+)\)")  # how safetensors tells it


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A hidden path beside `path` to write; at the end it is durable and takes the place of `path`.

    Where anything fails nothing is left over, and what stood at `path` is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, each name durable."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable. Windows cannot sync a folder."""
    if os.name == "nt" and path.is_dir():
        return
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def disk_faults(where: Path, then: str) -> Iterator[None]:
    """DiskError in place of what the disk refuses inside: the file, the reason, and `then`."""
    try:
        yield
    except OSError as fault:
        if fault.errno not in _OF_THE_DISK:
            raise
        raise DiskError(f"{fault.filename or where}: {fault.strerror}; {then}") from fault
    except Exception as fault:
        number = _NUMBERED.search(str(fault))
        if type(fault).__name__ != "SafetensorError" or number is None:
            raise
        raise DiskError(f"{where}: {os.strerror(int(number[1]))}; {then}") from fault
