"""What a machine is measured to take: kept, told apart by circumstances, and true to its steps."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from pennyweight import calibrate
from pennyweight.calibrate import LONG, SHORT, Measured, calibrated, remembered
from pennyweight.plan import named_device, plan, shapes_of

FOUND = Measured(process_bytes=400_000_000, flops=5e10, dequantized=2e9, short_s=0.05, long_s=0.8)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    methods: list[str] = []

    def measured(method: str) -> Measured:
        methods.append(method)
        return FOUND

    monkeypatch.setattr(calibrate, "_in_a_process", measured)
    return methods


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_the_plan_of_the_steps_that_were_measured_is_what_they_took(
    asked: list[str], tmp_path: Path, method: str
) -> None:
    config = calibrate._described(method)
    device = calibrated(named_device("cpu"), config, cache=tmp_path)
    for tokens, seconds in ((SHORT, FOUND.short_s), (LONG, FOUND.long_s)):
        run = calibrate._of_tokens(config, tokens)
        said = plan(run, shapes_of("builtin"), device=device)
        assert said.cost.step_seconds == pytest.approx(seconds)
        assert {p.name: p.bytes for p in said.parts}["process"] == FOUND.process_bytes
    assert ("interpreter, torch, kernels, measured here") in [p.note for p in said.parts]


def test_it_is_measured_once_for_a_method_and_a_machine(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, config = named_device("cpu"), calibrate._described("lora")
    first = calibrated(cpu, config, cache=tmp_path)
    assert calibrated(cpu, config, cache=tmp_path) == first
    assert asked == ["lora"]
    calibrated(cpu, calibrate._described("full"), cache=tmp_path)
    monkeypatch.setattr(calibrate, "_circumstances", lambda: ["another machine"])
    calibrated(cpu, config, cache=tmp_path)
    assert asked == ["lora", "full", "lora"]
    (tmp_path / "machine.json").write_text('{"x": {"flops": 1}}')  # of another version, or torn
    calibrated(cpu, config, cache=tmp_path)
    assert len(asked) == 4


def test_a_run_is_planned_by_what_was_measured_before_it(asked: list[str], tmp_path: Path) -> None:
    config = calibrate._described("lora")
    assert remembered(config, cache=tmp_path) is None
    known = calibrated(named_device("cpu"), config, cache=tmp_path)
    found = remembered(config, cache=tmp_path)
    assert found is not None
    assert replace(found, memory_bytes=0) == replace(known, memory_bytes=0)
    card = config.model_copy(update={"base": config.base.model_copy(update={"device": "cuda"})})
    assert remembered(card, cache=tmp_path) is None
    assert asked == ["lora"]


def test_another_environment_is_measured_for_itself(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu, config = named_device("cpu"), calibrate._described("lora")
    calibrated(cpu, config, cache=tmp_path)
    (tmp_path / "site" / "triton-3.0.dist-info").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    calibrated(cpu, config, cache=tmp_path)
    assert len(asked) == 2


def test_what_a_busy_machine_gave_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [replace(FOUND, long_s=8.0, waited=0.5), FOUND, replace(FOUND, long_s=80.0)]
    monkeypatch.setattr(calibrate, "_in_a_process", lambda method: found.pop(0))
    cpu, config = named_device("cpu"), calibrate._described("lora")
    busy = calibrated(cpu, config, cache=tmp_path)
    idle = calibrated(cpu, config, cache=tmp_path)
    assert busy != idle
    assert calibrated(cpu, config, cache=tmp_path) == idle
    assert len(found) == 1


def test_other_devices_and_what_cannot_be_measured_stay_as_they_are(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, card = calibrate._described("qlora"), named_device("rtx4090")
    assert calibrated(card, config, cache=tmp_path) is card
    monkeypatch.setattr(calibrate, "_in_a_process", lambda method: None)
    cpu = named_device("cpu")
    assert calibrated(cpu, config, cache=tmp_path) is cpu
    assert asked == []


def test_a_process_of_its_own_measures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What that process does, done in this one; and an answer that is none."""
    monkeypatch.setattr(calibrate, "SHORT", 8)
    monkeypatch.setattr(calibrate, "LONG", 32)
    found = calibrate.measure("qlora")
    assert found.flops > 1e8
    assert found.dequantized > 1e5
    assert found.short_s > 0
    assert found.process_bytes is None or found.process_bytes > 50e6

    def run(command: list[str], **_: Any) -> Any:
        assert command[1:] == ["-m", "pennyweight.calibrate", "qlora"]
        return type("Done", (), {"stdout": f"warm\n{json.dumps(asdict(found))}\n"})

    monkeypatch.setattr(calibrate.subprocess, "run", run)
    assert calibrate._in_a_process("qlora") == found
    monkeypatch.setattr(
        calibrate.subprocess, "run", lambda *_, **__: type("Done", (), {"stdout": "Killed\n"})
    )
    assert calibrate._in_a_process("qlora") is None
