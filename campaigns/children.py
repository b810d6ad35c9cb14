"""A process a case, without its start-up: the campaign imports once and forks a child that trains.

The child is `pennyweight train run.yaml` from its command line on; only the interpreter's start and
the imports are shared. Its words go to a file. `calls_of` and `Strace` look at, kill or refuse its
system calls.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from campaigns.tally import Absent

__all__ = [
    "Call",
    "Child",
    "Strace",
    "calls_of",
    "need_strace",
    "stop_before",
    "wait_for_tracer",
    "warm",
]

LONGEST_S = 120.0
_PR_SET_PDEATHSIG = 1
_CALL = re.compile(r"^(?:\d+\s+)?(\w+)\((.*)$")


def warm() -> None:
    """Import what a run needs. Pictures are left out: drawing one takes as long as the small run."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.update(dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "1"))
    import torch

    torch.set_num_threads(1)
    sys.modules.setdefault("matplotlib", None)  # type: ignore[arg-type]
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pennyweight.cli
    import pennyweight.finetune  # noqa: F401


class Child:
    """A forked `pennyweight` command; `before` runs in it first."""

    def __init__(
        self, arguments: Sequence[str], said: Path, before: Callable[[], object] | None = None
    ) -> None:
        self.said_in = said
        self.code: int | None = None
        self.began = time.monotonic()
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads that sleep
            self.pid = os.fork()
        if self.pid == 0:
            _be_the_command(list(arguments), said, before, parent)

    @property
    def said(self) -> str:
        return self.said_in.read_text(encoding="utf-8", errors="replace")

    def send(self, number: int) -> None:
        if self.code is None:
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = LONGEST_S) -> int:
        """Its exit code, negative for the signal that killed it; TimeoutError kills it.

        While this process stands still too (stopped, or the machine asleep) no time is counted.
        """
        waited_s, seen = 0.0, time.monotonic()
        while self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            waited_s, seen = waited_s + min(time.monotonic() - seen, 0.1), time.monotonic()
            if found:
                self.code = os.waitstatus_to_exitcode(status)
            elif waited_s > timeout_s:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                self.code = -signal.SIGKILL
                raise TimeoutError(f"still running after {timeout_s:.0f} s: {self.said[-500:]}")
            else:
                time.sleep(0.001)
        return self.code

    def until(self, happened: Callable[[], bool]) -> bool:
        """Wait for it; False where the child ended first."""
        while not happened():
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self.code = os.waitstatus_to_exitcode(status)
                return False
            time.sleep(0.0005)
        return True

    def listens(self) -> bool:
        """Whether SIGTERM reaches a handler of its own by now."""
        return bool(int(self._status("SigCgt"), 16) >> (signal.SIGTERM - 1) & 1)

    def stopped(self) -> bool:
        return self._status("State").startswith("T")

    def traced(self) -> bool:
        return self._status("TracerPid") != "0"

    def _status(self, field: str) -> str:
        return _status_of(self.pid, field)


def _end_with(parent: int) -> None:
    """Let the system kill this process when its parent ends, however that comes about."""
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(99)


def _be_the_command(
    arguments: list[str], said: Path, before: Callable[[], object] | None, parent: int
) -> None:
    code = 99
    try:
        _end_with(parent)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv[0] = "pennyweight"
        from pennyweight.cli import main

        if before is not None:
            before()
        main(arguments)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def stop_before(code: CodeType, nth: int, *, then: Callable[[], object] | None = None) -> None:
    """In this process, from now on: at the n-th call of this function stop (SIGSTOP), or do `then`."""
    left = nth

    def profiler(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        if event == "call" and frame.f_code is code:
            left -= 1
            if left == 0:
                sys.setprofile(None)
                if then is None:
                    os.kill(os.getpid(), signal.SIGSTOP)
                else:
                    then()

    sys.setprofile(profiler)


def wait_for_tracer() -> None:
    """In the child: stopped until it is traced; whoever else lets it go on does not matter."""
    while _status_of("self", "TracerPid") == "0":
        os.kill(os.getpid(), signal.SIGSTOP)


def _status_of(process: int | str, field: str) -> str:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return line.split(":", 1)[1].strip()
    raise KeyError(field)


def need_strace() -> str:
    found = shutil.which("strace")
    if found is None:
        raise Absent("strace is not installed (apt install strace; Linux only)")
    return found


@dataclass(frozen=True, slots=True)
class Call:
    """The `number`-th call of this name that a process made while it was traced."""

    name: str
    number: int
    text: str

    def __str__(self) -> str:
        return f"{self.name} {self.number}: {self.text[:80]}"


class Strace:
    """strace attached to a stopped child, which goes on once it is."""

    def __init__(self, child: Child, log: Path, *options: str) -> None:
        command = [need_strace(), "-f", "-qq", "-o", str(log), *options, "-p", str(child.pid)]
        self._strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while child.code is None and not child.traced():
            if self._strace.poll() is not None:
                child.send(signal.SIGKILL)
                child.wait()
                assert self._strace.stderr is not None
                raise Absent(f"strace cannot trace here: {self._strace.stderr.read()[-200:]}")
            time.sleep(0.001)
        child.send(signal.SIGCONT)

    def end(self) -> None:
        """Once the child has ended."""
        self._strace.wait()
        assert self._strace.stderr is not None
        self._strace.stderr.close()


def calls_of(log: Path) -> list[Call]:
    """The calls in a log of strace, each with its place among those of its name."""
    counts: Counter[str] = Counter()
    calls = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _CALL.match(line)
        if match and "resumed>" not in line:
            counts[match[1]] += 1
            calls.append(Call(match[1], counts[match[1]], match[2]))
    return calls
