"""How the C library hands out memory to a run on a CPU.

glibc aligns a block by cutting pieces off both ends, and a thread's cache hands these to whoever
asks for a few bytes. What is freed between them fits no block of its size again, and a run grows by
what chance leaves of it. Without that cache most pieces grow together again: less memory, but not
the same in equal runs (970 and 1,060 MB of two), which the plan's part `allocator` allows for. Large
pages more than make up for the time. glibc reads both as a process starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

__all__ = ["TUNABLES", "give_back", "glibc", "start_again_tuned", "tuned"]

TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.hugetlb=1"
_NAME = "GLIBC_TUNABLES"
_PROGRAMS = ("pennyweight", "__main__.py")


def start_again_tuned() -> None:
    """Become the same command again under `TUNABLES`; return where that would change nothing.

    It is left alone where the environment has a word on allocation already, `GLIBC_TUNABLES=`
    included, and where this process was not started as the command: it is somebody else's then.
    """
    spoken_for = [n for n in os.environ if n in (_NAME, "LD_PRELOAD") or n.startswith("MALLOC_")]
    if spoken_for or not glibc() or Path(sys.argv[0]).name not in _PROGRAMS:
        return
    with contextlib.suppress(OSError):  # untuned it runs too
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, os.environ | {_NAME: TUNABLES})


def tuned() -> bool:
    """Whether this process, and those it starts, run under `TUNABLES`."""
    return glibc() and os.environ.get(_NAME) == TUNABLES and "LD_PRELOAD" not in os.environ


def give_back() -> None:
    """Return to the system what was freed and lies between blocks in use, where the library is glibc."""
    if glibc():
        ctypes.CDLL(None).malloc_trim(0)


def glibc() -> bool:
    """Whether the C library is glibc."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    return False
