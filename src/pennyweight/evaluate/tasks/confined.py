"""Programs that a model wrote, each in an interpreter of its own, within limits, never in ours.

`find_confinement` tries what this machine offers and says what holds. It is no sandbox against an
attacker: docs/benchmarks.md says what it does not protect from.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pennyweight.errors import ConfigError

__all__ = ["Confinement", "Verdict", "find_confinement", "run_confined"]

CPU_S, WALL_S, MEMORY_BYTES = 5, 30, 2**30
LIMITS = {
    "CPU": CPU_S,
    "AS": MEMORY_BYTES,
    "FSIZE": 0,
    "NPROC": 0,
    "NOFILE": 64,
    "CORE": 0,
}
MOST_SAID_BYTES = 4096
SCRIPT = Path(__file__).with_name("confined_program.py")
# Namespaces of its own: no network but an unplugged loopback, no other process to signal.
APART = ("--net", "--pid", "--ipc", "--fork", "--kill-child")
# Root's programs run as nobody, who may read what root may (its Python, say) and write nothing.
AS_NOBODY = (
    "--reuid=65534",
    "--regid=65534",
    "--clear-groups",
    "--no-new-privs",
    "--inh-caps=-all,+dac_read_search",
    "--ambient-caps=-all,+dac_read_search",
)
SOUND = "import heapq, statistics\nassert statistics.mean([1, 2]) == 1.5"
# A thread counts as a process: where one can be begun, so could a process.
CANNOT_MULTIPLY = """import _thread
try: _thread.start_new_thread(int, ())
except RuntimeError: pass
else: raise SystemExit"""


@dataclass(frozen=True, slots=True)
class Confinement:
    """`command` goes before the interpreter; `holds` says in words what limits a program here."""

    command: tuple[str, ...]
    holds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a program ran to its end, or why not: an exception's name, `timeout` or `killed`."""

    passed: bool
    why: str = ""
    held: tuple[str, ...] = ()


def find_confinement() -> Confinement:
    """The tightest that runs a sound program on this machine; ConfigError where none does.

    A program never runs as root: where root cannot be left, nothing is run.
    """
    if os.name != "posix":
        raise ConfigError(
            "--allow-code-execution: programs can be limited on Linux and macOS only; leave humaneval out"
        )
    for command in _commands():
        verdict = run_confined(SOUND, Confinement(command))
        if verdict.passed:
            alone = run_confined(CANNOT_MULTIPLY, Confinement(command)).passed
            return Confinement(command, _in_words(command, verdict, alone))
    mend = "as another user than root" if os.geteuid() == 0 else "on another machine"
    raise ConfigError(
        f"--allow-code-execution: not even a sound program runs within limits here; run it {mend}, or leave "
        "humaneval out"
    )


def _commands() -> list[tuple[str, ...]]:
    """The tightest first; what this system does not have is left out."""
    unshare = shutil.which("unshare") if sys.platform == "linux" else None
    setpriv = shutil.which("setpriv") if sys.platform == "linux" else None
    root = os.geteuid() == 0
    user = () if root else ("--user",)
    apart = [(unshare, *user, *APART), (unshare, *user, "--net")] if unshare else []
    nobody = [(setpriv, *AS_NOBODY)] if root and setpriv else []
    return [
        tuple(part for part in (*first, *second) if part)
        for first in (*apart, ())
        for second in (*nobody, ())
    ]


def _in_words(command: tuple[str, ...], verdict: Verdict, alone: bool) -> tuple[str, ...]:
    known = {
        f"{CPU_S} s of CPU": "CPU" in verdict.held,
        f"{WALL_S} s in all": True,
        f"{MEMORY_BYTES >> 20:,} MiB of memory": "AS" in verdict.held,
        "no file written": "FSIZE" in verdict.held,
        "no further process": alone,
        "no network": "--net" in command,
        "no other process within reach": "--pid" in command,
    }
    return tuple(words for words, holds in known.items() if holds)


def run_confined(program: str, confinement: Confinement) -> Verdict:
    """Run one program to its end or its limits, in an empty folder, without our environment."""
    nonce = secrets.token_hex(16)
    asked = {
        "program": program,
        "nonce": nonce,
        "limits": LIMITS,
    }
    # Isolated, without site packages, without bytecode written.
    interpreter = (sys.executable, "-I", "-S", "-B", str(SCRIPT))
    with tempfile.TemporaryDirectory(prefix="pennyweight-") as empty:
        process = subprocess.Popen(
            [*confinement.command, *interpreter],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=empty,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            said = _converse(process, json.dumps(asked).encode())
        finally:
            _end(process)
    return _judged(said, nonce)


def _converse(process: subprocess.Popen[bytes], asked: bytes) -> bytes | None:
    """What the process said before it ended, 4 KiB at most; None where its time ran out."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(asked)
        process.stdin.close()
    said, ends = b"", time.monotonic() + WALL_S
    while len(said) < MOST_SAID_BYTES:
        ready, _, _ = select.select([process.stdout], [], [], max(0.0, ends - time.monotonic()))
        if not ready:
            return None
        piece = os.read(process.stdout.fileno(), MOST_SAID_BYTES)
        if not piece:
            break
        said += piece
    return said


def _end(process: subprocess.Popen[bytes]) -> None:
    """Nothing of it lives on, whatever it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _judged(said: bytes | None, nonce: str) -> Verdict:
    """Only who knows the nonce may say that the program passed: leaving early is no success."""
    if said is None:
        return Verdict(False, "timeout")
    try:
        found = json.loads(said)
    except ValueError:
        return Verdict(False, "killed")
    if not isinstance(found, dict) or found.get("nonce") != nonce:
        return Verdict(False, "killed")
    return Verdict(
        found["passed"] is True,
        str(found.get("why", "")),
        tuple(found["held"]),
    )
