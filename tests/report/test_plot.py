"""The loss plot draws what a log has, whatever it lacks."""

import sys
from pathlib import Path
from typing import Any

import pytest

from pennyweight.report import Report, plot_losses, plot_rows
from pennyweight.report.plot import smoothed

STEPS = [{"kind": "step", "number": n, "loss": 2 / n, "learning_rate": 1e-4} for n in range(1, 30)]
EVALUATIONS = [{"kind": "evaluation", "number": n, "loss": 2 / n} for n in (10, 20)]


@pytest.mark.parametrize(
    "events",
    [
        STEPS + EVALUATIONS,
        STEPS[:1],
        EVALUATIONS[:1],
        [{"kind": "step", "number": 1, "loss": "nan", "learning_rate": 0.0}],
        [{"kind": "start"}],
        [],
    ],
)
def test_a_picture_is_made_of_what_is_there(
    tmp_path: Path, events: list[dict[str, object]]
) -> None:
    pytest.importorskip("matplotlib")
    assert plot_losses(events, tmp_path / "loss.png") is None
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_log_is_drawn_from_its_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with Report(tmp_path) as report:
        report.evaluation(1, 2.5)
    assert plot_losses(report.path, tmp_path / "loss.png") is None


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pennyweight[plots]" in (plot_losses(STEPS, tmp_path / "loss.png") or "")


def test_smoothing_has_no_lag_and_keeps_a_constant() -> None:
    assert smoothed([3.0] * 9, span=4) == pytest.approx([3.0] * 9)
    ramp = [float(n) for n in range(200)]
    assert smoothed(ramp, span=8)[100] == pytest.approx(100, abs=0.1)
    assert smoothed(ramp, span=1) == ramp
    assert smoothed([], span=5) == []


@pytest.mark.parametrize(
    "rows",
    [
        ([30, 40, 900], [10, 12, 100], [0, 0, 400], {"the answer is empty": 3}),
        ([5], [2], [0], {}),
        ([10, 12, 90_000], [1, 2, 3], [0, 0, 89_000], {"why " * 60: 1}),
        ([], [], [], {"no assistant turn": 7}),
    ],
)
def test_rows_are_drawn_whatever_became_of_them(tmp_path: Path, rows: Any) -> None:
    pytest.importorskip("matplotlib")
    *columns, dropped = rows
    picture = tmp_path / "ledger.png"
    assert plot_rows(*columns, picture, max_length=500, dropped=dropped) is None
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_no_picture_of_rows_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = plot_rows([3], [1], [0], tmp_path / "a.png", max_length=9, dropped={})
    assert "pennyweight[plots]" in (said or "")


def test_the_line_of_the_longest_length_is_inside_the_picture() -> None:
    from matplotlib.figure import Figure

    from pennyweight.report.rows import _draw_lengths

    for limit in (200, 320, 512, 600):
        axes = Figure().subplots()
        _draw_lengths(axes, [150, 200, 326], [40, 60, 80], limit)
        drawn = [line for line in axes.lines if line.get_xdata()[0] == limit + 0.5]
        assert len(drawn) == (limit <= 512)
        assert not drawn or limit + 0.5 < axes.get_xlim()[1]
