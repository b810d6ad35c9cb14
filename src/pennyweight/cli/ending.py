"""How a command ends: the exit code, and what is said when it failed."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pennyweight.cli.show import visible
from pennyweight.errors import Aborted, Interrupted, PennyweightError
from pennyweight.files import disk_faults

__all__ = ["not_begun", "run_command"]

INTERNAL, USAGE = 1, 2
HEARD_AGAIN_S = 0.01


def run_command(command: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> int:
    """Run it and give its exit code (errors.py lists them); nothing of ours leaves a traceback.

    With `--json` among the arguments the error is one JSON object, the last line of stdout.
    """
    as_json = "--json" in arguments
    try:
        with disk_faults(Path(), "free some space, or mend the folder's rights"):
            code = command(arguments)
    except PennyweightError as error:
        resume = _again(arguments) if isinstance(error, Interrupted | Aborted) else None
        return _failed(type(error).__name__, str(error), error.exit_code, as_json, resume)
    except KeyboardInterrupt:
        return _failed("Aborted", "interrupted", Aborted.exit_code, as_json)
    except BrokenPipeError:
        # Whoever read the output has seen enough; Python must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if said := _usage_message(error):
            return _failed("UsageError", said, USAGE, as_json)
        return _failed(type(error).__name__, _internal_message(error), INTERNAL, as_json)
    return code if isinstance(code, int) else 0


@contextmanager
def not_begun() -> Iterator[None]:
    """While a command only prepares, SIGTERM and Ctrl-C end it at once as Interrupted: there is
    nothing to save yet. What runs inside may listen itself, and gives the signals back.
    """

    last = 0

    def hear(number: int, _frame: FrameType | None) -> None:
        nonlocal last
        last = number
        # As Ctrl-C it passes every `except Exception` of what is being imported.
        raise KeyboardInterrupt(signal.Signals(number).name)

    def ignored(fault: sys.UnraisableHookArgs) -> None:
        # Heard in a destructor, where Python drops every exception: heard again a moment later.
        if fault.exc_type is KeyboardInterrupt and last:
            threading.Timer(HEARD_AGAIN_S, _send_to_main, (last,)).start()
        else:
            dropped(fault)

    dropped, sys.unraisablehook = sys.unraisablehook, ignored
    heard = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, hear) for n in heard if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    except KeyboardInterrupt as stopped:
        raise Interrupted(f"{stopped}: nothing was begun, so nothing is lost") from None
    finally:
        sys.unraisablehook = dropped
        for number, previous in before.items():
            signal.signal(number, previous or signal.SIG_DFL)


def _send_to_main(number: int) -> None:
    """A signal to the main thread, which wakes where it sleeps."""
    if sys.platform == "win32":
        signal.raise_signal(number)
    elif (main := threading.main_thread().ident) is not None:
        signal.pthread_kill(main, number)


def _again(arguments: Sequence[str]) -> str:
    """The command to type to go on."""
    program = ["pennyweight"]
    if Path(sys.argv[0]).name == "__main__.py":
        program = ["python", "-m", "pennyweight"]
    words = [*program, *arguments]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _failed(
    kind: str, message: str, exit_code: int, as_json: bool, resume: str | None = None
) -> int:
    error = {"kind": kind, "exit_code": exit_code, "message": message}
    error |= {"faults": message.splitlines()} | ({"resume": resume} if resume else {})
    with contextlib.suppress(OSError):  # nobody reads on; the exit code still says it
        if as_json:
            print(json.dumps({"error": error}), flush=True)
        else:
            said = message + (f"\nresume: {resume}" if resume else "")
            print(visible(said), file=sys.stderr, flush=True)
    return exit_code


def _usage_message(error: Exception) -> str | None:
    """What the command-line library says of arguments it could not parse, or None."""
    if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "pennyweight"
    return f"{error.format_message()}\n`{path} --help` lists what it takes"


def _internal_message(error: Exception) -> str:
    """One line for the person, the traceback in a file for whoever mends it."""
    if os.environ.get("PENNYWEIGHT_DEBUG"):
        traceback.print_exc()
    first = next(iter(str(error).splitlines()), "")
    said = f"something went wrong inside: {type(error).__name__}: {first}"
    try:
        file, path = tempfile.mkstemp(prefix="pennyweight-", suffix=".log", text=True)
        with os.fdopen(file, "w", encoding="utf-8", errors="backslashreplace") as log:
            traceback.print_exception(error, file=log)
    except OSError:
        return f"{said}\nPENNYWEIGHT_DEBUG=1 shows the traceback"
    return f"{said}\nthe traceback is in {path}; PENNYWEIGHT_DEBUG=1 shows it here"
