"""How long a job takes: evaluations counted as a run makes them, at a speed that was measured once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi")

from pennyweight.config import BaseConfig, DataConfig, RunConfig, TrainConfig
from pennyweight.finetune.run import Run
from pennyweight.plan import DataSize, Device, named_device, plan
from pennyweight.serve import pace
from pennyweight.serve.pace import Pace, evaluations, job_seconds
from tests.serve.test_jobs import create, rows, until, upload

MEASURED = replace(named_device("cpu"), launch_s=1e-5, dequantized=1e9)


@pytest.mark.parametrize(("steps", "every"), [(7, 2), (6, 2), (25, None), (4, None)])
def test_evaluations_are_as_many_as_a_run_makes(
    started: Callable[..., Any],
    client_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    every: int | None,
) -> None:
    client = client_of(started())
    made, measured = [], Run._loss_report

    def counted(run: Run, adapter: str | None) -> Any:
        made.append(adapter)
        return measured(run, adapter)

    monkeypatch.setattr(Run, "_loss_report", counted)
    train = {"max_steps": steps} | ({} if every is None else {"eval_steps": every})
    held = upload(client, rows(2, " held out"), "held.jsonl")
    job = create(client, validation_file=held, train=train)
    until(client, job, "succeeded")
    assert len(made) == evaluations(steps, every)


def test_held_out_rows_cost_their_forward_passes(tiny_llama_folder: Path) -> None:
    run = RunConfig(
        base=BaseConfig(model=str(tiny_llama_folder), device="cpu"),
        data=DataConfig(train="rows.jsonl"),
        train=TrainConfig(max_steps=20, batch_size=2, eval_steps=5),
    )
    predicted = plan(run, device=MEASURED, rows=DataSize(rows=40, tokens=4000, longest=100))
    assert predicted.cost.seconds is not None

    def prepared(*lengths: int) -> Any:
        return SimpleNamespace(eval=_Rows(lengths))

    alone, measured = (job_seconds(predicted, run, prepared(*some)) for some in ((), (300, 300)))
    assert alone == pytest.approx(predicted.cost.seconds)
    forward_s = 600 / predicted.cost.tokens_a_second / 3
    assert measured == pytest.approx(alone + 6 * forward_s)


class _Rows:
    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths

    def __getitem__(self, which: slice) -> _Rows:
        return _Rows(self.lengths[which])


def test_the_machine_is_measured_until_it_was_idle_and_never_twice_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, idle, gate = [], False, threading.Event()

    def measured(device: Device, config: RunConfig) -> Device:
        asked.append(config.train.method)
        assert gate.wait(10)
        return MEASURED

    monkeypatch.setattr(pace, "calibrated", measured)
    monkeypatch.setattr(pace, "remembered", lambda config: MEASURED if idle else None)
    known = Pace(BaseConfig(device="cpu"))
    for _ in range(8):
        known.measure()
    assert known.device(0.01) is None
    gate.set()
    assert known.device(10) == MEASURED
    assert asked == ["qlora"]
    _until(lambda: not known._measuring)
    known.measure()  # it was busy: once more
    _until(lambda: len(asked) == 2 and not known._measuring)
    idle = True
    known.measure()
    assert len(asked) == 2


def test_what_cannot_be_measured_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "calibrated", lambda device, config: device)
    known = Pace(BaseConfig(device="cpu", quantization="none"))
    known.measure()
    assert known.device(10) is None


def _until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)
