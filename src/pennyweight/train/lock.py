"""One writer an output folder: a lock that the system itself lets go when its holder dies."""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import time
from pathlib import Path

from pennyweight.errors import ConfigError, DiskError

if sys.platform != "win32":  # there the file is written, but nothing holds a second run off
    import fcntl

__all__ = ["RunLock"]


class RunLock:
    """`with RunLock(output_dir):` owns the folder. ConfigError names a living owner.

    The file `run.lock` stays behind; who holds it is the system's business, so a killed run's does
    not stand in the way.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        self._number: int | None = None

    def __enter__(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as fault:
            raise DiskError(
                f"{self.path.parent}: cannot be written to ({fault.strerror}); "
                "check its rights, or name another output_dir"
            ) from fault
        try:
            self._take(number)
            owner = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            }
            os.ftruncate(number, 0)
            os.pwrite(number, json.dumps(owner).encode(), 0)
        except OSError as fault:
            os.close(number)
            raise DiskError(f"{self.path}: cannot be locked ({fault.strerror})") from fault
        except ConfigError:
            os.close(number)
            raise
        self._number = number
        return self

    def __exit__(self, *_: object) -> None:
        if self._number is not None:
            os.close(self._number)
            self._number = None

    def _take(self, number: int) -> None:
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            if fault.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ConfigError(
                f"{self.path.parent}: another run is writing here ({_owner(number)}); wait for "
                "it, stop it, or name another output_dir"
            ) from None


def _owner(number: int) -> str:
    try:
        found = json.loads(os.pread(number, 4096, 0))
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its owner left no name"
