"""`ledger.png`: how long the rows of a data set are, what of them is trained, and what is left out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pennyweight.files import whole
from pennyweight.report.plot import FAINT, INK, quieten

__all__ = ["plot_rows"]

_READ, _TRAINED, _LOST, _LEFT_OUT = "#9fb8d3", "#3f8f5f", "#d1495b", "#b8bec6"
_BINS = 60
_LETTER = 0.0092  # width of a letter in the bars, as a share of the picture's
_LONG_TAIL = 12  # times the median; past it lengths are drawn on a logarithmic scale


def plot_rows(
    tokens: Sequence[int],
    trained: Sequence[int],
    cut: Sequence[int],
    path: str | os.PathLike[str],
    *,
    max_length: int,
    dropped: Mapping[str, int],
    title: str = "Rows of the training set, in tokens",
) -> str | None:
    """Draw the kept rows: their tokens before the cut, those trained and those cut off, one figure
    each a row; `dropped` counts the others by reason.

    Gives None, or why nothing was drawn: a picture is not worth a command, so nothing is raised
    when matplotlib is absent.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return 'no picture: matplotlib is absent; `pip install "pennyweight[plots]"` adds it'
    figure = Figure(figsize=(9, 6), dpi=150, facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.015, ha="left", fontsize=13, fontweight="bold", color=INK)
    lengths, shares = figure.subplots(2, 1, height_ratios=[4, 1.35])
    _draw_lengths(lengths, tokens, trained, max_length)
    rows_cut = sum(each > 0 for each in cut)
    rows = {
        "whole": (len(tokens) - rows_cut, _TRAINED),
        "cut": (rows_cut, _LOST),
        **{f"left out: {why}": (count, _LEFT_OUT) for why, count in dropped.items()},
    }
    read = sum(tokens) - sum(cut) - sum(trained)
    what = {
        "trained": (sum(trained), _TRAINED),
        "only read": (read, _READ),
        "cut off": (sum(cut), _LOST),
    }
    _draw_shares(shares, {"rows": rows, "tokens": what})
    with whole(Path(path)) as partial:
        figure.savefig(partial, format=Path(path).suffix.lstrip(".") or "png")
    return None


def _draw_lengths(
    axes: Any, tokens: Sequence[int], trained: Sequence[int], max_length: int
) -> None:
    """Two histograms on one scale; rows beyond the line in the colour of what is lost."""
    longest = max(max(tokens, default=1), 1)
    middle = sorted(tokens)[len(tokens) // 2] if tokens else 1
    by_factors = longest > _LONG_TAIL * max(1, min(middle, max_length))
    shortest = max(1, min(trained, default=1)) if by_factors else 0
    edges = _edges(shortest, longest, by_factors)
    # A bin edge at the cut, so that no bar is on both sides of it.
    edges = sorted({*edges, max_length + 0.5} if max_length < longest else {*edges})
    kinds = (
        ("tokens", [n for n in tokens if n <= max_length], _READ, 1.0),
        (f"longer than {max_length:,}", [n for n in tokens if n > max_length], _LOST, 1.0),
        ("trained tokens", list(trained), _TRAINED, 0.55),
    )
    for label, values, colour, alpha in kinds:
        if values:
            axes.hist(values, bins=edges, color=colour, alpha=alpha, label=label)
    right = edges[-1]
    if max_length <= 1.6 * longest:
        right = max(right, 1.03 * max_length)
        axes.axvline(max_length + 0.5, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.annotate(
            f"max_length {max_length:,}",
            (max_length + 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color=INK,
        )
    else:
        axes.set_title(
            f"the longest row has {longest:,}; max_length is {max_length:,}",
            loc="left",
            fontsize=9,
            color=FAINT,
        )
    if by_factors:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlim(edges[0], right)
    axes.set_ylabel("rows", color=FAINT, fontsize=9)
    axes.set_xlabel("tokens in a row", color=FAINT, fontsize=9)
    quieten(axes)
    if tokens:
        axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper right")


def _edges(shortest: int, longest: int, by_factors: bool) -> list[float]:
    if not by_factors:
        width = max(
            1, -(-(longest + 1) // _BINS)
        )  # whole tokens, so that no bar is empty by chance
        return [n - 0.5 for n in range(0, longest + width + 1, width)]
    ratio = ((longest + 1) / shortest) ** (1 / _BINS)
    edges = [shortest - 0.5]
    while edges[-1] <= longest:
        edges.append(max(edges[-1] * ratio, edges[-1] + 1))
    return edges


def _draw_shares(axes: Any, bars: Mapping[str, Mapping[str, tuple[int, str]]]) -> None:
    """One bar of 100 % a kind of thing; a part without room for its name is named above the bar."""
    for place, (name, parts) in enumerate(bars.items()):
        total = sum(count for count, _ in parts.values()) or 1
        left = 0.0
        small = []
        for part, (count, colour) in parts.items():
            share = count / total
            if not count:
                continue
            axes.barh(place, share, 0.5, left=left, color=colour, edgecolor="white", linewidth=1)
            said = f"{count:,} {part} ({share:.1%})"
            if len(said) * _LETTER < share:
                where, ink = left + share / 2, INK if colour in (_READ, _LEFT_OUT) else "white"
                axes.text(where, place, said, ha="center", va="center", fontsize=9, color=ink)
            else:
                small.append(said if len(said) < 80 else f"{said[:60]}… ({share:.1%})")
            left += share
        axes.text(0, place - 0.38, name, ha="left", va="center", fontsize=9, color=FAINT)
        beside = "; ".join(small)
        axes.text(1, place - 0.38, beside, ha="right", va="center", fontsize=8, color=FAINT)
    axes.set(xlim=(0, 1), ylim=(len(bars) - 0.6, -0.55))
    axes.set_axis_off()
