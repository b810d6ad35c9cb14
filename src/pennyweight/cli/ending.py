"""How a command ends: the exit code, and what is said when it failed."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

from pennyweight.errors import Aborted, PennyweightError

__all__ = ["run_command"]

INTERNAL, USAGE = 1, 2


def run_command(command: Callable[[Sequence[str]], object], arguments: Sequence[str]) -> int:
    """Run it and give its exit code (errors.py lists them); nothing of ours leaves a traceback.

    With `--json` among the arguments the error is one JSON object, the last line of stdout.
    """
    as_json = "--json" in arguments
    try:
        code = command(arguments)
    except PennyweightError as error:
        return _failed(type(error).__name__, str(error), error.exit_code, as_json)
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


def _failed(kind: str, message: str, exit_code: int, as_json: bool) -> int:
    if as_json:
        error = {"kind": kind, "exit_code": exit_code, "message": message}
        print(json.dumps({"error": {**error, "faults": message.splitlines()}}))
    else:
        print(message, file=sys.stderr)
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
