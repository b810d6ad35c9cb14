"""The log is appended whole, survives a kill, and a resumed log equals an uninterrupted one."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pennyweight.errors import ConfigError, DiskError
from pennyweight.report import Report, duration, metrics_of, open_sinks, progress_line, read_events


@dataclass(frozen=True)
class Step:
    number: int
    loss: float
    learning_rate: float = 1e-4
    tokens: int = 100
    seconds: float = 0.5


def test_an_event_is_one_line_with_its_time_and_kind(tmp_path: Path) -> None:
    with Report(tmp_path / "run") as report:
        report.event("start", model="builtin", note="two\nlines \ud800 ü")
        (line,) = report.path.read_bytes().splitlines()
    event = json.loads(line)
    assert list(event) == ["time", "kind", "model", "note"]
    assert event["time"].endswith("Z")


def test_numbers_that_are_not_finite_are_never_bare(tmp_path: Path) -> None:
    with Report(tmp_path) as report:
        report.event(
            "step",
            number=1,
            loss=math.nan,
            norms=[math.inf, -math.inf, 1.5],
            tensor=torch.tensor(2.0),
            array=np.float32("nan"),
            where=Path("a"),
            inside=Step(1, math.nan),
        )
        text = report.path.read_text()
    event = json.loads(text, parse_constant=lambda word: pytest.fail(f"bare {word}"))
    assert event["loss"] == event["array"] == "nan"
    assert event["norms"] == ["inf", "-inf", 1.5]
    assert event["tensor"] == 2.0
    assert event["where"] == "a"
    assert event["inside"]["loss"] == "nan"


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def train(report: Report, first: int, last: int) -> None:
        for number in range(first, last + 1):
            report.step(Step(number, loss=1 / number), total_steps=6, every=100)
            if number % 2 == 0:
                report.event("evaluation", number=number, loss=1 / number)

    with Report(tmp_path / "whole") as whole:
        whole.begin()
        train(whole, 1, 6)
    with Report(tmp_path / "cut") as cut:
        train(cut, 1, 3)
        offset = cut.offset
        train(cut, 4, 5)
    with cut.path.open("ab") as log:
        log.write(b'{"kind": "st')  # killed within a write
    with Report(tmp_path / "cut") as resumed:
        resumed.event("plan", peak_bytes=1)
        resumed.resume(offset)
        train(resumed, 4, 6)
    assert metrics_of(read_events(cut.path)) == metrics_of(read_events(whole.path))
    assert [event["kind"] for event in read_events(cut.path)].count("plan") == 1


def test_a_run_that_begins_forgets_one_that_left_no_checkpoint(tmp_path: Path) -> None:
    with Report(tmp_path) as report:
        report.event("step", number=1)
    with Report(tmp_path) as report:
        report.event("plan", peak_bytes=1)
        report.begin()
        report.evaluation(1, 0.5)
    assert [event["kind"] for event in read_events(report.path)] == ["plan", "evaluation"]


@pytest.mark.parametrize("offset", [7, 10_000])
def test_a_changed_log_is_kept_and_said_and_never_blocks(tmp_path: Path, offset: int) -> None:
    with Report(tmp_path) as report:
        report.event("step", number=1)
    with Report(tmp_path) as report:
        report.resume(offset)
        report.event("step", number=2)
    assert [event["kind"] for event in read_events(report.path)] == ["step", "log_changed", "step"]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    with Report(tmp_path) as report:
        report.event("step", number=1, filler="x" * 200_000)
    with report.path.open("ab") as log:
        log.write(b'{"kind": "step", "filler": "' + b"y" * 200_000)
    assert len(list(read_events(report.path))) == 1
    with Report(tmp_path) as report:
        report.event("step", number=2)
    assert [event["number"] for event in read_events(report.path)] == [1, 2]


def test_a_full_disk_is_said_and_leaves_no_torn_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with (
        Report(tmp_path) as report,
        pytest.raises(DiskError, match="could not be written: No space left on device; free"),
    ):
        report.event("step", number=1)


def test_progress_is_told_first_last_and_every_so_often(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Report(tmp_path) as report:
        for number in range(1, 26):
            report.step(Step(number, loss=1.25), total_steps=25, every=10)
    lines = capsys.readouterr().err.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 10, 20, 25]
    assert lines[1] == "step 10/25   40%  loss 1.2500  lr 1.00e-04  200 tok/s  eta 0:08"


def test_progress_without_a_clock() -> None:
    line = progress_line(
        1, 400, loss=math.nan, learning_rate=0, tokens_per_second=math.nan, eta_seconds=math.inf
    )
    assert line == "step   1/400    0%  loss nan  lr 0.00e+00  nan tok/s  eta unknown"
    assert [duration(s) for s in (7, 723, 3723, 183_845)] == [
        "0:07",
        "12:03",
        "1:02:03",
        "2d 3:04:05",
    ]


def test_sinks_get_the_numbers_of_numbered_events(tmp_path: Path) -> None:
    class Kept:
        def __init__(self) -> None:
            self.got: list[tuple[int, dict[str, float]]] = []

        def write(self, number: int, values: dict[str, float]) -> None:
            self.got.append((number, dict(values)))

        def close(self) -> None:
            self.got.append((-1, {}))

    kept = Kept()
    with Report(tmp_path, sinks=[kept]) as report:
        report.event("start", model="builtin")
        report.event("evaluation", number=3, loss=0.5, best=True, text="x")
    assert kept.got == [(3, {"evaluation/loss": 0.5, "evaluation/best": 1.0}), (-1, {})]


def test_an_absent_sink_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError) as caught:
        Report(tmp_path, sinks=["wandb", "tensorboard"])
    assert "pennyweight[wandb]" in str(caught.value)
    assert "pennyweight[tensorboard]" in str(caught.value)
    assert open_sinks([], tmp_path) == ()
