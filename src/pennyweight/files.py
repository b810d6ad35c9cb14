"""Files written whole or not at all, and what the disk refuses told apart from every other fault."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pennyweight.errors import DiskError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["disk_faults", "lock", "make_folder", "mend", "scratch_folder", "sync", "whole"]

_SCRATCH = ".unfinished-"
# Windows locks bytes and keeps others from reading them; this one is far behind what is written.
_LOCKED_BYTE = 1 << 30

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


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder in `parent` to fill and rename; what is left of it goes at the end.

    It is locked while it lives, so that those of killed processes can be told apart: they are
    removed first. (Windows cannot lock a folder; there they stay.)
    """
    for left in parent.glob(f"{_SCRATCH}*"):
        _remove_abandoned(left)
    folder, number = _new_scratch(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if number is not None:
            os.close(number)


def _remove_abandoned(folder: Path) -> None:
    """Remove a scratch folder that no living process holds; what cannot be locked stays."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            if lock(number):
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(number)


def _new_scratch(parent: Path) -> tuple[Path, int | None]:
    """A scratch folder and the open file that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=parent))
        if sys.platform == "win32":
            return folder, None
        # Until it is locked another process may take it for a dead one's, and remove it.
        with contextlib.suppress(FileNotFoundError):
            number = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks
                if not lock(number):
                    os.close(number)
                    continue
            if folder.is_dir():
                return folder, number
            os.close(number)


def lock(number: int) -> bool:
    """Take the lock of an open file for this process; False where a living one holds it.

    The system lets go of it when the file is closed or its holder dies.
    """
    try:
        if sys.platform == "win32":
            os.lseek(number, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        if fault.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            return False
        raise
    return True


def mend(fault: OSError) -> str:
    """What to do about a folder or a file that cannot be written."""
    full = fault.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None), errno.EFBIG)
    return "free some space" if full else "check its rights"


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
