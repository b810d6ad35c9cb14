"""Watches one reading of hostile material: what it did (audit events, PEP 578), how long it took."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pennyweight.errors import PennyweightError

__all__ = ["CANARY", "Watched", "judged", "watching"]

CANARY = "PENNYWEIGHT_CANARY"
"""An environment variable that planted code would set."""

_RUNS = {
    "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "pickle.find_class",
    "shutil.unpack_archive", "socket.connect", "socket.getaddrinfo", "subprocess.Popen",
}  # fmt: skip
_WRITES = {
    "os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
    "os.truncate", "shutil.rmtree",
}  # fmt: skip
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass
class Watched:
    """What was seen; `folder` holds the hostile files, and no code of it may run."""

    folder: str
    seen: list[str] = field(default_factory=list)
    cpu_s: float = 0.0

    def notice(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _RUNS or event in _WRITES:
            self.seen.append(f"{event} {str(arguments)[:80]}")
        elif event == "open":
            path, mode, flags = arguments
            writes = isinstance(flags, int) and flags & _WRITE_FLAGS
            if (writes or set(str(mode or "")) & set("wax+")) and "__pycache__" not in str(path):
                self.seen.append(f"wrote {path!r}")
        elif event in ("exec", "import"):
            file = getattr(arguments[0], "co_filename", None) if event == "exec" else arguments[1]
            if isinstance(file, str) and file.startswith(self.folder):
                self.seen.append(f"ran {file}")


_now: Watched | None = None
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _now is not None:
        _now.notice(event, arguments)


@contextmanager
def watching(folder: Path) -> Iterator[Watched]:
    """Audit events and thread time of what is done inside."""
    global _now, _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    watched = Watched(str(folder))
    began, _now = time.thread_time(), watched
    try:
        yield watched
    finally:
        _now = None
        watched.cpu_s = time.thread_time() - began
        if os.environ.pop(CANARY, None):
            watched.seen.append("planted code ran")


def judged(
    act: Callable[[], object], folder: Path, *, limit_s: float, may_pass: bool
) -> tuple[str | None, float]:
    """What broke the promise, or None, and the seconds of processor it took.

    Kept: a refusal of ours that says something, in a few lines, or where `may_pass` no refusal.
    """
    fault: str | None = None
    with watching(folder) as watched:
        try:
            act()
        except PennyweightError as refused:
            said = str(refused)
            if not said.strip() or len(said) > 20_000:
                fault = f"a refusal of {len(said):,} characters"
        except Exception as error:
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            fault = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            fault = None if may_pass else "not refused"
    if watched.seen:
        fault = f"{fault or 'did'}: {'; '.join(watched.seen[:3])}"
    if fault is None and watched.cpu_s > limit_s:
        fault = f"took {watched.cpu_s:.2f} s"
    return fault, watched.cpu_s
