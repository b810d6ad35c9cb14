"""A part of the comparison, or a whole run, in a process of its own: its answer, or its error."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from pennyweight import errors
from pennyweight.errors import Interrupted, MemoryExhausted, PennyweightError

__all__ = ["in_a_process"]

POLL_S = 0.2
KILLED = -9


def in_a_process(
    arguments: Sequence[str], job: Mapping[str, Any] | None, stop: Callable[[], str | None]
) -> dict[str, Any]:
    """Run `pennyweight ARGUMENTS --json` with `job` on its stdin; gives the object it ends with.

    Its progress goes to our stderr. Its error is raised here under the same name. Once `stop()` is
    true it is asked to end, and what it saved is resumed by the same command: Interrupted.
    """
    command = [sys.executable, "-m", "pennyweight", *arguments, "--json"]
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        given.write(json.dumps(job).encode())
        given.seek(0)
        # A session of its own, so that the terminal's Ctrl-C comes once, and from here.
        process = subprocess.Popen(command, stdin=given, stdout=said, start_new_session=True)
        try:
            code = _awaited(process, stop)
        except BaseException:
            process.kill()
            process.wait()
            raise
        answer = _last_line(said)
    if code == 0 and answer is not None:
        return answer
    if code == Interrupted.exit_code or stop():
        raise Interrupted(
            f"{stop() or 'a signal'}: what is done is kept, and the same command resumes"
        )
    raise _error(code, answer)


def _awaited(process: subprocess.Popen[bytes], stop: Callable[[], str | None]) -> int:
    asked = False
    while True:
        try:
            return process.wait(POLL_S)
        except subprocess.TimeoutExpired:
            if stop() and not asked:
                process.terminate()
                asked = True


def _last_line(said: IO[bytes]) -> dict[str, Any] | None:
    said.seek(0)
    lines = said.read().splitlines()
    try:
        found = json.loads(lines[-1])
    except (IndexError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _error(code: int, answer: Mapping[str, Any] | None) -> PennyweightError:
    told = (answer or {}).get("error")
    if told is not None:
        kind = getattr(errors, told["kind"], PennyweightError)
        return kind(told["message"])
    if code == KILLED:
        return MemoryExhausted("its process was killed, as the system does when memory runs out")
    return PennyweightError(f"its process ended with code {code} and no answer")
