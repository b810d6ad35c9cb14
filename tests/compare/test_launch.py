"""Processes of their own: answers and errors come back, and a signal ends it resumable."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pennyweight.compare.launch import _error, in_a_process
from pennyweight.config import to_yaml
from pennyweight.errors import ConfigError, Interrupted, MemoryExhausted, PennyweightError


def never() -> None:
    return None


def test_an_answer_comes_back() -> None:
    assert in_a_process(["explain", "seed"], None, never)["key"] == "seed"


def test_an_error_comes_back_under_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        in_a_process(["train", str(tmp_path / "nowhere.yaml")], None, never)


def test_one_that_was_asked_to_stop_is_interrupted() -> None:
    with pytest.raises(Interrupted, match="SIGTERM: what is done is kept"):
        in_a_process(["compare-part", "groundwork"], {}, lambda: "SIGTERM")


def test_deaths_without_a_word() -> None:
    assert isinstance(_error(-9, None), MemoryExhausted)
    assert str(_error(-11, None)) == "its process ended with code -11 and no answer"
    told = {"error": {"kind": "UsageError", "message": "wrong"}}
    assert type(_error(2, told)) is PennyweightError


def test_a_signal_in_the_middle_of_an_arm_ends_with_75_and_a_checkpoint(
    description: Any, tmp_path: Path
) -> None:
    settings = {"arms": ["lora"], "learning_rates": {"lora": 1e-3}}
    config = description(tmp_path / "out", train={"max_steps": 100_000}, **settings)
    (tmp_path / "run.yaml").write_text(to_yaml(config, commented=False))
    process = subprocess.Popen(
        [sys.executable, "-m", "pennyweight", "compare", "run.yaml"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    events = tmp_path / "out" / "lora-r4" / "seed-0" / "events.jsonl"
    try:
        while process.poll() is None:
            if events.is_file() and '"kind": "step"' in events.read_text():
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.1)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert "the same command resumes" in said
    assert list((events.parent / "checkpoints").iterdir())
