"""One writer a folder; the lock names its owner and dies with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pennyweight.errors import ConfigError, DiskError
from pennyweight.train.lock import RunLock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the lock needs fcntl")

HOLDER = """
import os, sys
from pathlib import Path
from pennyweight.train.lock import RunLock
with RunLock(Path(sys.argv[1])):
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_and_the_first_named(tmp_path: Path) -> None:
    with RunLock(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
        RunLock(tmp_path).__enter__()
    with RunLock(tmp_path):
        pass


def test_a_killed_owner_does_not_stand_in_the_way(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        pid = holder.stdout.readline().strip()
        with pytest.raises(ConfigError, match=f"process {pid} on "):
            RunLock(tmp_path).__enter__()
        holder.kill()
        holder.wait()
    with RunLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="name another output_dir"):
        RunLock(tmp_path / "file" / "run").__enter__()
