"""The watch over the tests sees what it is there for: a violation of each kind is planted and found."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, violations


def unpickle() -> None:
    pickle.loads(pickle.dumps(os.getcwd))


def write() -> None:
    Path("/nowhere-of-pennyweight/file").write_text("")


def write_into_the_checkout() -> None:
    with (REPOSITORY / "src" / "nowhere" / "file").open("ab"):
        pass


def make_a_folder() -> None:
    Path("/nowhere-of-pennyweight/a/b").mkdir()


def move_out() -> None:
    Path("/nowhere-of-pennyweight/a").rename("/nowhere-of-pennyweight/b")


def remove() -> None:
    Path("/nowhere-of-pennyweight/file").unlink()


def connect() -> None:
    door = socket.socket()
    door.close()  # the attempt is seen, and nothing is sent
    door.connect(("192.0.2.1", 443))


def look_up() -> None:
    # Numbers only: the question is seen, and no server is asked.
    socket.getaddrinfo("pennyweight.invalid", 443, flags=socket.AI_NUMERICHOST)


PLANTED: dict[Callable[[], None], str] = {
    unpickle: "unpickled posix.getcwd" if os.name == "posix" else "unpickled nt.getcwd",
    write: "wrote '/nowhere-of-pennyweight/file'",
    write_into_the_checkout: "wrote ",
    make_a_folder: "os.mkdir ",
    move_out: "os.rename ",
    remove: "os.remove ",
    connect: "socket.connect '192.0.2.1'",
    look_up: "socket.getaddrinfo ",
}


@pytest.mark.parametrize("planted", PLANTED, ids=lambda each: each.__name__)
def test_a_planted_violation_is_seen(planted: Callable[[], None], tmp_path: Path) -> None:
    (tmp_path / "allowed").write_text("in a temporary folder")
    assert violations() == []
    with suppress(OSError):  # it cannot be done here; that it was tried is what counts
        planted()
    found = violations()
    assert len(found) == 1
    assert found[0].startswith(PLANTED[planted])


def test_a_child_is_watched_too(tmp_path: Path) -> None:
    code = "import os, pickle; open('kept', 'w').close(); pickle.loads(pickle.dumps(os.getcwd))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    (found,) = violations()
    assert "getcwd (in a child: " in found


def test_it_fails_the_test_that_made_it_and_names_it(tmp_path: Path) -> None:
    planted = tmp_path / "test_planted.py"
    planted.write_text(
        "import os, pickle\n"
        "def test_good(tmp_path): (tmp_path / 'a').write_text('b')\n"
        "def test_bad(): pickle.loads(pickle.dumps(os.getcwd))\n"
        "def test_good_again(): pass\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    options = ["-q", "-p", "tests.conftest", "-c", str(tmp_path / "pytest.ini")]
    options += [f"--rootdir={tmp_path}", f"--basetemp={tmp_path / 'base'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(planted)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "3 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "test_planted.py::test_bad" in done.stdout
    assert "unpickled " in done.stdout
