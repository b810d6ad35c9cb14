"""`loss.png`: training loss, held-out loss and learning rate over the steps of a run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pennyweight.files import whole
from pennyweight.report.log import read_events

__all__ = ["FAINT", "GRID", "INK", "plot_losses", "plot_many", "quieten", "smoothed"]

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
_TRAIN, _EVAL, _RATE = "#2b6cb0", "#d1495b", "#5b8c5a"

Points = list[tuple[int, float]]


def plot_losses(
    events: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str = "Loss in nats per trained token",
) -> str | None:
    """Draw the `step` and `evaluation` events of a log (fields `number`, `loss`, `learning_rate`).

    Gives None, or why nothing was drawn: a picture is not worth a run, so nothing is raised when
    matplotlib is absent.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return 'no loss plot: matplotlib is absent; `pip install "pennyweight[plots]"` adds it'
    if isinstance(events, str | os.PathLike):
        events = read_events(events)
    kept = list(events)
    train, rate = _points(kept, "step", "loss"), _points(kept, "step", "learning_rate")
    held_out = _points(kept, "evaluation", "loss")
    figure = Figure(figsize=(9, 5.4), dpi=150, facecolor="white", layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    figure.suptitle(title, x=0.015, ha="left", fontsize=13, fontweight="bold", color=INK)
    _draw_losses(upper, train, held_out)
    lower.plot(*_columns(rate), color=_RATE, linewidth=1.6)
    lower.set_ylabel("learning rate", color=FAINT, fontsize=9)
    lower.set_ylim(bottom=0)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    lower.yaxis.get_offset_text().set(fontsize=8, color=FAINT)
    lower.set_xlabel("optimizer step", color=FAINT, fontsize=9)
    lower.locator_params(axis="y", nbins=3)
    for axes in (upper, lower):
        quieten(axes)
    with whole(Path(path)) as partial:
        figure.savefig(partial, format=Path(path).suffix.lstrip(".") or "png")
    return None


def plot_many(
    logs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike[str]
) -> str | None:
    """Training losses, faint, and held-out losses of several runs in one picture; as `plot_losses`."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        return 'no picture: matplotlib is absent; `pip install "pennyweight[plots]"` adds it'
    figure = Figure(figsize=(9, 5.4), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots()
    figure.suptitle(
        "Loss in nats per trained token: held out, and training (faint)",
        x=0.015, ha="left", fontsize=13, fontweight="bold", color=INK,
    )  # fmt: skip
    colors = colormaps["tab10" if len(logs) <= 10 else "turbo"]
    for i, (name, events) in enumerate(logs.items()):
        color = colors(i) if len(logs) <= 10 else colors(i / (len(logs) - 1))
        train = _points(events, "step", "loss")
        held_out = _points(events, "evaluation", "loss")
        if train:
            numbers, losses = _columns(train)
            mean = smoothed(losses, span=len(losses) / 25)
            axes.plot(numbers, mean, color=color, alpha=0.35, linewidth=1.1)
        points = held_out or train
        if points:
            axes.plot(
                *_columns(points),
                color=color,
                linewidth=1.6,
                marker="o" if held_out else "",
                markersize=4,
                label=f"{name} {points[-1][1]:.3f}",
            )
    axes.set_xlabel("optimizer step", color=FAINT, fontsize=9)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper right")
    quieten(axes)
    with whole(Path(path)) as partial:
        figure.savefig(partial, format=Path(path).suffix.lstrip(".") or "png")
    return None


def smoothed(losses: Sequence[float], span: float) -> list[float]:
    """Exponential averages over about `span` steps, forwards and then backwards: no lag."""

    def averages(values: Iterable[float]) -> list[float]:
        total = weight = 0.0
        means = []
        for value in values:
            total, weight = decay * total + value, decay * weight + 1
            means.append(total / weight)
        return means

    decay = max(0.0, 1 - 2 / max(2.0, span))
    return averages(averages(losses)[::-1])[::-1]


def _draw_losses(axes: Any, train: Points, held_out: Points) -> None:
    if train:
        numbers, losses = _columns(train)
        mean = smoothed(losses, span=len(losses) / 25)
        axes.plot(numbers, losses, color=_TRAIN, alpha=0.28, linewidth=0.9)
        axes.plot(numbers, mean, color=_TRAIN, linewidth=2, label=f"training {mean[-1]:.3f}")
        drawn = sorted([*losses, *(loss for _, loss in held_out)])
        most = max(drawn[int(0.99 * (len(drawn) - 1))], mean[0])
        margin = 0.06 * (most - drawn[0]) or 0.05
        # A few wild steps at the start would flatten everything after them.
        axes.set_ylim(drawn[0] - margin, most + margin)
    if held_out:
        best = min(held_out, key=lambda point: point[1])
        axes.plot(
            *_columns(held_out),
            color=_EVAL,
            linewidth=1.6,
            marker="o",
            markersize=4.5,
            markeredgecolor="white",
            label=f"held out {held_out[-1][1]:.3f}",
        )
        axes.plot(*best, marker="o", markersize=10, fillstyle="none", color=_EVAL)
        axes.annotate(
            f"best {best[1]:.3f}",
            best,
            xytext=(0, 11),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=_EVAL,
        )
    if train or held_out:
        axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper right")


def quieten(axes: Any) -> None:
    """No frame, faint marks, lines across where values are read."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _points(events: Sequence[Mapping[str, Any]], kind: str, name: str) -> Points:
    """(step, value) of the events that have both; values that are not finite are left out."""
    found = [
        (int(event["number"]), float(event[name]))
        for event in events
        if event.get("kind") == kind and "number" in event and event.get(name) is not None
    ]
    return [(number, value) for number, value in found if math.isfinite(value)]


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [number for number, _ in points], [value for _, value in points]
