"""One writer an output folder: a lock that the system itself lets go when its holder dies."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Literal

from pennyweight.errors import ConfigError, DiskError
from pennyweight.files import lock, make_folder, mend

__all__ = ["RunLock"]


class RunLock:
    """`with RunLock(output_dir):` owns the folder. ConfigError names a living owner.

    `who` writes there: a run, or a server. Its file stays behind; who holds it is the system's
    business, so a killed owner's does not stand in the way.
    """

    def __init__(self, folder: Path, who: Literal["run", "server"] = "run") -> None:
        self._who, self._setting = who, {"run": "output_dir", "server": "data_dir"}[who]
        self.path = folder / f"{who}.lock"
        self._number: int | None = None

    def __enter__(self) -> RunLock:
        try:
            make_folder(self.path.parent)
            number = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as fault:
            raise DiskError(
                f"{self.path.parent}: cannot be written to ({fault.strerror}); {mend(fault)}, or "
                f"name another {self._setting}"
            ) from fault
        try:
            if not lock(number):
                raise ConfigError(
                    f"{self.path.parent}: another {self._who} is writing here ({_owner(number)}); wait "
                    f"for it, stop it, or name another {self._setting}"
                )
            _sign(number)
        except OSError as fault:
            os.close(number)
            raise DiskError(
                f"{self.path}: cannot be locked ({fault.strerror}); {mend(fault)}, or name another "
                "output_dir"
            ) from fault
        except ConfigError:
            os.close(number)
            raise
        self._number = number
        return self

    def __exit__(self, *_: object) -> None:
        if self._number is not None:
            os.close(self._number)
            self._number = None


def _sign(number: int) -> None:
    """Name this process as the owner."""
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    os.ftruncate(number, 0)
    os.lseek(number, 0, os.SEEK_SET)
    os.write(number, json.dumps(owner).encode())


def _owner(number: int) -> str:
    try:
        os.lseek(number, 0, os.SEEK_SET)
        found = json.loads(os.read(number, 4096))
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its owner left no name"
