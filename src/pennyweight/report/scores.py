"""`scores.png`: what readers reached on tasks, one line a figure, each with its interval."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pennyweight.files import whole
from pennyweight.report.plot import FAINT, GRID, INK, quieten

__all__ = ["plot_scores"]

_ALONE, _AFTER = "#2b6cb0", "#d1495b"

Figure = tuple[float, tuple[float, float] | None]


def plot_scores(
    scores: Sequence[tuple[str, Mapping[str, Figure]]],
    path: str | os.PathLike[str],
    *,
    title: str,
) -> str | None:
    """Draw (name, {arm: (value, interval)}) from top to bottom; up to two arms.

    Gives None, or why nothing was drawn: nothing is raised when matplotlib is absent.
    """
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        return 'no picture: matplotlib is absent; `pip install "pennyweight[plots]"` adds it'
    height = 1.3 + 0.42 * len(scores)
    figure = Canvas(figsize=(9, height), dpi=150, facecolor="white", layout="constrained")
    axes: Any = figure.subplots()
    figure.suptitle(title, x=0.015, ha="left", fontsize=13, fontweight="bold", color=INK)
    arms = list(dict.fromkeys(arm for _, figures in scores for arm in figures))
    for number, arm in enumerate(arms):
        shift = 0.16 * (2 * number - len(arms) + 1)
        colour = (FAINT, _AFTER)[number] if len(arms) == 2 else _ALONE
        points = [(at, figures[arm]) for at, (_, figures) in enumerate(scores) if arm in figures]
        for at, (_, interval) in points:
            if interval is not None:
                axes.plot(interval, [at + shift] * 2, color=colour, linewidth=2, alpha=0.45)
        axes.plot(
            [value for _, (value, _) in points],
            [at + shift for at, _ in points],
            linestyle="none",
            marker="o",
            markersize=6,
            markeredgecolor="white",
            color=colour,
            label=arm,
        )
    axes.set_yticks(range(len(scores)), [name for name, _ in scores])
    axes.set_ylim(len(scores) - 0.5, -0.5)
    quieten(axes)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.tick_params(axis="y", labelsize=10, labelcolor=INK)
    if len(arms) > 1:
        figure.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper right", ncols=2)
    with whole(Path(path)) as partial:
        figure.savefig(partial, format=Path(path).suffix.lstrip(".") or "png")
    return None
