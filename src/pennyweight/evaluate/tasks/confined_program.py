"""One program, run within limits: the script that a separate interpreter starts, never imported.

It reads a JSON object from standard input, binds itself (resource limits, another user where it is
root, a hook that refuses what no test needs), runs the program, and says on its first standard
output whether the program ended by itself.
"""

import contextlib
import json
import os
import sys

NOBODY = 65534
# What a program that defines and calls functions asks of the system: imports list and read files.
ALLOWED_OS = {"os.listdir", "os.scandir"}
REFUSED = (
    "os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pty.", "fcntl.", "resource.", "signal.",
    "syslog.", "tempfile.", "webbrowser.", "urllib.", "http.", "ftplib.", "smtplib.", "_winapi.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def leave_root() -> None:
    """Nobody's files may be touched in root's name; a no-op for everyone else."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def bind(limits: dict[str, int]) -> list[str]:
    """Set each limit for good; gives the names of those that this system knows."""
    import resource

    held = []
    for name, most in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
            held.append(name)
    return held


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """The audit hook: a second fence behind the limits, which no program can take down again."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
        if writes or (isinstance(flags, int) and flags & WRITING):
            raise PermissionError("writing files is refused here")
    elif event.startswith(REFUSED) and event not in ALLOWED_OS:
        raise PermissionError(f"{event} is refused here")


def main() -> None:
    asked = json.loads(sys.stdin.buffer.read())
    verdict = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    said = {"nonce": asked["nonce"], "held": bind(asked["limits"])}
    leave_root()
    sys.addaudithook(refuse)
    try:
        exec(compile(asked["program"], "<program>", "exec"), {"__name__": "__main__"})
        said["passed"] = True
    except BaseException as fault:  # a program may raise anything, SystemExit and MemoryError too
        said["passed"] = False
        said["why"] = type(fault).__name__
    os.write(verdict, json.dumps(said).encode())


if __name__ == "__main__":
    main()
