"""A command that trains starts itself again with glibc's settings: once, and only where it may."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from pennyweight import allocator
from pennyweight.allocator import TUNABLES, start_again_tuned, tuned


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What it was started again as, on a machine with glibc and nothing said of allocation."""
    found: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: found.append(given))
    monkeypatch.setattr(allocator, "glibc", lambda: True)
    for name in [n for n in os.environ if n.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["/bin/pennyweight", "train", "run.yaml"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "/bin/pennyweight", "train", "run.yaml"])
    return found


def test_it_is_the_same_command_with_the_settings(started: list[Any]) -> None:
    start_again_tuned()
    ((program, command, environment),) = started
    assert program == sys.executable
    assert command == [sys.executable, "/bin/pennyweight", "train", "run.yaml"]
    assert environment == os.environ | {"GLIBC_TUNABLES": TUNABLES}


@pytest.mark.parametrize(
    "name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD"]
)
def test_an_environment_that_has_its_own_word_is_left_alone(
    started: list[Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "")
    start_again_tuned()
    assert started == []
    assert not tuned()


def test_somebody_elses_process_and_other_libraries_are_left_alone(
    started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["-c"])
    start_again_tuned()
    monkeypatch.setattr(sys, "argv", ["/bin/pennyweight"])
    monkeypatch.setattr(allocator, "glibc", lambda: False)
    start_again_tuned()
    assert started == []


def test_it_runs_on_where_it_cannot(started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "execve", refused)
    start_again_tuned()


@pytest.mark.skipif(not allocator.glibc(), reason="the settings are glibc's")
def test_the_command_runs_under_them_and_a_light_verb_does_not() -> None:
    """Whoever looks at the environment of the process that trains sees them."""
    look = "import os, sys; sys.argv[0] = 'pennyweight'; from pennyweight.cli import main; main()"
    told = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
    shown = {}
    for verb in ("plan", "init"):
        traced = f"import os; print(os.environ.get('GLIBC_TUNABLES', '')); {look}"
        done = subprocess.run(
            [sys.executable, "-c", traced, verb, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env=told,
        )
        shown[verb] = [line for line in done.stdout.splitlines() if "malloc" in line]
    assert shown == {"plan": [TUNABLES], "init": []}
