"""Processes of their own: answers and errors come back, and a signal ends it resumable."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pennyweight.compare import compare
from pennyweight.compare.launch import _error, in_a_process
from pennyweight.errors import ConfigError, Interrupted, MemoryExhausted, PennyweightError
from tests.compare.conftest import Launched


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


def test_a_signal_in_the_middle_of_an_arm_leaves_a_checkpoint_to_resume_from(
    description: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arm trains in a process of its own; the comparison, and its other parts, in this one."""
    parts = Launched()

    def launched(arguments: Any, job: Any, *, stop: Any) -> dict[str, Any]:
        in_this = arguments[0] != "train"
        return parts(arguments, job) if in_this else in_a_process(arguments, job, stop)

    monkeypatch.setattr("pennyweight.compare.experiment.in_a_process", launched)
    settings = {"arms": ["lora"], "learning_rates": {"lora": 1e-3}}
    config = description(tmp_path / "out", train={"max_steps": 100_000}, **settings)
    events = tmp_path / "out" / "lora-r4" / "seed-0" / "events.jsonl"

    def send_at_the_first_step() -> None:
        while not (events.is_file() and '"kind": "step"' in events.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send_at_the_first_step, daemon=True).start()
    with pytest.raises(Interrupted, match=r"SIGTERM: .* the same command resumes"):
        compare(config, say=lambda text: None)
    last = max((events.parent / "checkpoints").iterdir())
    assert last.name > "step-000000"
