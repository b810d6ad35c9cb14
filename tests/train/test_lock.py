"""One writer a folder; the lock names its owner and dies with it."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path

import pytest

from pennyweight.errors import ConfigError, DiskError
from pennyweight.train.lock import RunLock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the lock needs fcntl")


def test_a_second_run_is_refused_and_the_first_named(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def holder_of(folder: Path) -> int:
    """A forked process that owns the folder, and does nothing else until it is killed."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads; the child starts none
        child = os.fork()
    if child == 0:
        with RunLock(folder):
            os.write(writer, b"held")
            signal.pause()
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 4) == b"held"
    os.close(reader)
    return child


def test_a_killed_owner_does_not_stand_in_the_way(tmp_path: Path) -> None:
    child = holder_of(tmp_path)
    try:
        with pytest.raises(ConfigError, match=f"process {child} on "):
            RunLock(tmp_path).__enter__()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with RunLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="name another output_dir"):
        RunLock(tmp_path / "file" / "run").__enter__()
