"""What the tests may not do, seen by Python itself (`sys.addaudithook`, PEP 578): load a pickle that
names code, write outside temporary folders and caches, or connect to another machine.

An audit hook stays for the life of a process and cannot be taken off or fooled by a caught
exception. Violations are recorded, not prevented; tests/conftest.py fails the test that made one.
Children report theirs through the file that `PENNYWEIGHT_AUDIT_LOG` names: tests/children holds a
`sitecustomize` that puts the same hook into every Python the tests start.
Only the standard library is imported, for the children's sake.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

LOG, FOLDERS = "PENNYWEIGHT_AUDIT_LOG", "PENNYWEIGHT_AUDIT_WRITABLE"

_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DEVICES = ("/dev/", "/proc/self/", "/proc/thread-self/")
# What Python and the test tools keep beside the code: compiled modules, examples that failed.
_CACHES = ("__pycache__", ".pytest_cache", ".hypothesis", ".import_linter_cache")
# Of a checkout that itself lies in the temporary folder nothing may be written all the same.
_REPOSITORY = os.path.realpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
_HERE = {"localhost", "127.0.0.1", "::1", "0.0.0.0", "", None}
# event -> which of its arguments name something that is changed, and the open folder it is in
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.link": ((1, 3),),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.rmdir": ((0, 1),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.utime": ((0, 3),),
}


class Audit:
    """Folders that may be written, and where violations go."""

    def __init__(self, folders: list[str], record: Callable[[str], None]) -> None:
        self.folders = [os.path.realpath(each) for each in folders]
        self.record = record
        self.paused = False
        self._busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _WATCHED or self._busy or self.paused:
            return
        self._busy = True  # what is looked up below raises events of its own
        try:
            if said := _WATCHED[event](self, event, arguments):
                self.record(said)
        finally:
            self._busy = False

    def allows(self, path: Any) -> bool:
        if isinstance(path, int):
            return True  # already open
        name = os.fsdecode(path)
        if name.startswith(_DEVICES):
            return True
        whole = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        if any(part in _CACHES for part in whole.split(os.sep)):
            return True
        return not _within(whole, _REPOSITORY) and any(_within(whole, f) for f in self.folders)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def _opened(audit: Audit, event: str, arguments: tuple[Any, ...]) -> str | None:
    path, mode, flags = arguments
    written = isinstance(flags, int) and flags & _WRITE_FLAGS
    if isinstance(mode, str):
        written = written or any(letter in mode for letter in "wax+")
    return f"wrote {path!r}" if written and not audit.allows(path) else None


def _changed(audit: Audit, event: str, arguments: tuple[Any, ...]) -> str | None:
    for at, folder_at in _CHANGES[event]:
        path, folder = arguments[at], -1 if folder_at is None else arguments[folder_at]
        if folder != -1 and not isinstance(path, int):
            try:
                path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
            except OSError:
                continue  # not Linux; whoever opened the folder for this raised an event of its own
        if not audit.allows(path):
            return f"{event} {path!r}"
    return None


def _unpickled(audit: Audit, event: str, arguments: tuple[Any, ...]) -> str | None:
    return f"unpickled {arguments[0]}.{arguments[1]}"


def _connected(audit: Audit, event: str, arguments: tuple[Any, ...]) -> str | None:
    address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
    host = address[0] if isinstance(address, tuple) else address
    if isinstance(address, str | bytes) and event != "socket.getaddrinfo":
        return None  # a socket of this machine's file system
    host = host.decode() if isinstance(host, bytes) else host
    return None if host in _HERE or str(host).startswith("127.") else f"{event} {host!r}"


_WATCHED: dict[str, Callable[[Audit, str, tuple[Any, ...]], str | None]] = {
    "open": _opened,
    "pickle.find_class": _unpickled,
    "socket.connect": _connected,
    "socket.sendto": _connected,
    "socket.getaddrinfo": _connected,
    **dict.fromkeys(_CHANGES, _changed),
}


def install(record: Callable[[str], None], folders: list[str] | None = None) -> Audit:
    """The hook of this process: put in once, afterwards told where to report."""
    inherited = os.environ.get(FOLDERS, "").split(os.pathsep)
    allowed = [each for each in (*(folders or ()), *inherited, tempfile.gettempdir()) if each]
    audit: Audit | None = getattr(sys, "_pennyweight_audit", None)
    if audit is None:
        audit = Audit(allowed, record)
        sys._pennyweight_audit = audit  # type: ignore[attr-defined]
        sys.addaudithook(audit)
    else:
        audit.record = record
        audit.folders = [os.path.realpath(each) for each in allowed]
    return audit


def report_to(log: str) -> Callable[[str], None]:
    """Writes each violation as a line of `log`, at once, so that a killed child has told."""

    def record(said: str) -> None:
        number = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(number, f"{said} (in a child: {' '.join(sys.orig_argv)[:200]})\n".encode())
        finally:
            os.close(number)

    return record


def environment(log: str, folders: list[str]) -> dict[str, str]:
    """What children inherit to be watched too."""
    children = os.path.join(os.path.dirname(os.path.abspath(__file__)), "children")
    before = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != children]
    return {
        LOG: log,
        FOLDERS: os.pathsep.join(folders),
        "PYTHONPATH": os.pathsep.join([children, *before]),
    }
