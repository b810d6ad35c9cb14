"""The pictures of a comparison: worth and forgetting, range tests, rank saturation, effective rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pennyweight.compare.outcome import ArmOutcome, Comparison
from pennyweight.compare.tally import Figure
from pennyweight.files import whole
from pennyweight.report.plot import FAINT, GRID, INK, quieten

__all__ = ["draw"]

COLOURS = {"full": "#1f2933", "lora": "#2b6cb0", "qlora": "#d1495b", "base": "#7b8794"}
TITLES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}


def draw(found: Comparison, folder: Path) -> tuple[list[str], str | None]:
    """Draw what there is; gives the files' names, and why there are none where matplotlib is absent."""
    if not found.arms:
        return [], None
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        return [], 'no pictures: matplotlib is absent; `pip install "pennyweight[plots]"` adds it'
    pictures: dict[str, Callable[[Comparison, Any], Any]] = {"compare.png": _worth}
    if found.ranges:
        pictures["range_test.png"] = _ranges
    if len({arm.rank for arm in found.arms if arm.rank}) > 1:
        pictures["ranks.png"] = _ranks
    if any(arm.effective_rank for arm in found.arms):
        pictures["effective_rank.png"] = _effective_ranks
    for name, picture in pictures.items():
        canvas = Canvas(dpi=110, facecolor="white", layout="constrained")
        picture(found, canvas)
        with whole(folder / name) as partial:
            canvas.savefig(partial, format="png")
    return list(pictures), None


def _worth(found: Comparison, canvas: Any) -> None:
    """One row an arm: held-out loss, quality kept, change on general text."""
    arms = found.arms
    rows = len(arms) + 1
    canvas.set_size_inches(11, 1.5 + 0.46 * rows)
    kept = any(arm.kept for arm in arms)
    panels = canvas.subplots(1, 3 if kept else 2, sharey=True)
    _title(canvas, f"{found.test_rows:,} held-out rows, {len(found.seeds)} seeds a method")
    loss, *middle, general = panels
    base = found.bases[0] if found.bases else None
    for place, arm in enumerate(arms):
        colour = COLOURS[arm.method]
        _mark(loss, place, arm.loss, colour)
        _mark(general, place, arm.forgotten, colour)
        if middle and arm.kept is not None:
            _mark(middle[0], place, _hundredfold(arm.kept), colour, certain=arm.method == "full")
    if base is not None:
        _beyond(loss, arms, base.loss.mean)
    loss.set_yticks(range(len(arms)), [arm.label for arm in arms], color=INK)
    loss.set_ylim(len(arms) - 0.4, -0.6)
    loss.set_title("held-out loss, nats a token", **_CAPTION)
    general.set_title("forgetting: general text, change in nats", **_CAPTION)
    general.axvline(0, color=FAINT, linewidth=1)
    if middle:
        middle[0].set_title("quality kept, % of full", **_CAPTION)
        middle[0].axvline(100, color=FAINT, linewidth=1)
    for axes in panels:
        axes.margins(x=0.1)
        _quiet_rows(axes)
    legend = "bar: 95 % over documents    line: 95 % over seeds    dots: seeds"
    canvas.supxlabel(legend, fontsize=9, color=FAINT, x=0.01, ha="left")


def _mark(axes: Any, place: float, figure: Figure, colour: str, *, certain: bool = False) -> None:
    """A mean, each seed, the interval over documents as a bar, the one over seeds as a line."""
    if not certain:
        if figure.seeds is not None and len(figure.by_seed) > 2:  # of two it spans everything
            axes.plot(figure.seeds, (place, place), color=colour, linewidth=1, alpha=0.55)
        if figure.documents is not None:
            bar = {"linewidth": 11, "alpha": 0.28, "solid_capstyle": "butt"}
            axes.plot(figure.documents, (place, place), color=colour, **bar)
        dots = [place] * len(figure.by_seed)
        axes.plot(figure.by_seed, dots, "o", color=colour, markersize=3.2, alpha=0.6)
    shown = {"markersize": 7, "markeredgecolor": "white", "zorder": 5}
    axes.plot(figure.mean, place, "D", color=colour, **shown)


def _beyond(axes: Any, arms: Sequence[ArmOutcome], base: float) -> None:
    """The base's loss, written at the edge: drawn to scale it would flatten the arms."""
    axes.text(
        0.99,
        0.02,
        f"base {base:.3f}" + (" →" if base > max(arm.loss.mean for arm in arms) else ""),
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=9,
        color=COLOURS["base"],
    )


def _ranges(found: Comparison, canvas: Any) -> None:
    """Loss by learning rate, one line an arm; the chosen rate is ringed."""
    canvas.set_size_inches(8, 4.2)
    axes = canvas.subplots()
    first = found.ranges[0]
    _title(canvas, f"Range test: loss after {first.steps} steps, {first.rows} training rows apart")
    methods = {arm.label: arm for arm in found.arms}
    losses = [loss for curve in found.ranges for loss in curve.losses if loss is not None]
    highest = max(curve.before for curve in found.ranges)
    top = min(max(losses), highest) + 0.06 * (highest - min(losses))
    for number, curve in enumerate(found.ranges):
        arm = methods.get(curve.label)
        colour = COLOURS[arm.method if arm else curve.label.split()[0].lower()]
        points = [
            (rate, min(loss, top) if loss is not None else top)
            for rate, loss in zip(curve.rates, curve.losses, strict=True)
        ]
        style = _LINES[number % len(_LINES)] if len(found.ranges) > 3 else "-"
        chosen = "none stable" if curve.chosen is None else f"{curve.chosen:.2g}"
        axes.plot(
            *zip(*points, strict=True),
            style,
            color=colour,
            marker="o",
            markersize=3.5,
            linewidth=1.4,
            label=f"{curve.label}: {chosen}",
        )
        wild = [p for p, stable in zip(points, curve.stable, strict=True) if not stable]
        if wild:
            axes.plot(*zip(*wild, strict=True), "x", color=colour, markersize=8)
        for point in points:
            if point[0] == curve.chosen:
                axes.plot(*point, "o", color=colour, markersize=11, fillstyle="none")
    if highest <= top:
        axes.axhline(highest, color=COLOURS["base"], linewidth=1, linestyle=":")
        axes.text(first.rates[0], highest, "before", color=COLOURS["base"], fontsize=9, va="bottom")
    axes.set_xscale("log")
    axes.set_ylim(top=top + 0.04 * (highest - min(losses)))
    axes.set_xlabel("peak learning rate (ring: chosen, cross: unstable)", color=FAINT, fontsize=9)
    axes.set_ylabel("nats a token", color=FAINT, fontsize=9)
    beside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if len(found.ranges) > 5 else {}
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, **beside)
    quieten(axes)


def _ranks(found: Comparison, canvas: Any) -> None:
    """Held-out loss over rank beside full fine-tuning; and how much of the rank is used."""
    canvas.set_size_inches(10, 4.2)
    left, right = canvas.subplots(1, 2)
    _title(canvas, "What more rank is worth, and how much of it is used")
    ranks = sorted({arm.rank for arm in found.arms if arm.rank})
    for method in ("lora", "qlora"):
        arms = sorted((a for a in found.arms if a.method == method), key=lambda a: a.rank or 0)
        if not arms:
            continue
        at, colour = [arm.rank for arm in arms], COLOURS[method]
        left.plot(at, [arm.loss.mean for arm in arms], "o-", color=colour, label=TITLES[method])
        if all(arm.loss.documents for arm in arms):
            low, high = zip(*(arm.loss.documents or (0, 0) for arm in arms), strict=True)
            left.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        used = [_mean_rank(arm) for arm in arms]
        right.plot(at, used, "o-", color=colour, label=TITLES[method])
    for arm in found.arms:
        if arm.method == "full":
            left.axhline(arm.loss.mean, color=COLOURS["full"], linewidth=1.2, label="full")
    right.plot(ranks, ranks, ":", color=FAINT, label="all of it")
    for axes, caption in ((left, "held-out loss, nats a token"), (right, "mean effective rank")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ranks, [str(rank) for rank in ranks])
        axes.set_xlabel("rank", color=FAINT, fontsize=9)
        axes.set_title(caption, **_CAPTION)
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
        quieten(axes)
    right.set_yscale("log", base=2)
    right.set_yticks(ranks, [str(rank) for rank in ranks])


def _effective_ranks(found: Comparison, canvas: Any) -> None:
    """Effective rank as a share of the rank: layers across, kinds of module down, a panel an arm."""
    arms = [arm for arm in found.arms if arm.effective_rank]
    across = min(4, len(arms))
    down = -(-len(arms) // across)
    grids = [_by_layer(arm) for arm in arms]
    layers = max(len(row) for grid in grids for row in grid.values())
    kinds = max(len(grid) for grid in grids)
    width = min(4.0, max(2.6, 0.3 * layers))
    canvas.set_size_inches(1.6 + across * width, 1.2 + down * (0.7 + 0.3 * kinds))
    panels = canvas.subplots(down, across, squeeze=False, sharey=True)
    _title(canvas, "Effective rank of B·A, as a share of the rank")
    image = None
    for axes in panels.flat[len(arms) :]:
        axes.set_visible(False)
    for axes, arm, grid in zip(panels.flat, arms, grids, strict=False):
        rank = arm.rank or 1
        shares = [[value / rank for value in row] for row in grid.values()]
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axes.set_title(f"{arm.label}, mean {_mean_rank(arm):.1f}", **_CAPTION)
        axes.set_yticks(range(len(grid)), list(grid), fontsize=8, color=INK)
        axes.set_xlabel("layer", color=FAINT, fontsize=9)
        axes.tick_params(length=0, colors=FAINT, labelsize=8)
        axes.spines[:].set_visible(False)
        if layers <= 12:
            for y, row in enumerate(grid.values()):
                for x, value in enumerate(row):
                    ink = "white" if value < 0.55 * rank else "black"
                    axes.text(
                        x,
                        y,
                        f"{value:.0f}" if rank >= 10 else f"{value:.1f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color=ink,
                    )
            axes.set_xticks(range(layers))
    bar = canvas.colorbar(image, ax=panels, shrink=0.8, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, colors=FAINT, labelsize=8)


def _by_layer(arm: ArmOutcome) -> dict[str, list[float]]:
    """Effective ranks by kind of module (`q_proj`), one for each layer in the model's order."""
    assert arm.effective_rank is not None
    found: dict[str, list[float]] = {}
    for module in sorted(arm.effective_rank, key=_in_order):
        kind = module.rsplit(".", 1)[-1]
        found.setdefault(kind, []).append(arm.effective_rank[module].mean)
    longest = max(map(len, found.values()))
    return {kind: [*row, *[float("nan")] * (longest - len(row))] for kind, row in found.items()}


def _in_order(module: str) -> list[tuple[int, str]]:
    """Layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"[.]", module)]


def _mean_rank(arm: ArmOutcome) -> float:
    ranks = [figure.mean for figure in (arm.effective_rank or {}).values()]
    return sum(ranks) / max(1, len(ranks))


def _hundredfold(figure: Figure) -> Figure:
    def hundred(between: tuple[float, float] | None) -> tuple[float, float] | None:
        return None if between is None else (100 * between[0], 100 * between[1])

    by_seed = tuple(100 * value for value in figure.by_seed)
    return Figure(100 * figure.mean, by_seed, hundred(figure.documents), hundred(figure.seeds))


def _quiet_rows(axes: Any) -> None:
    quieten(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.tick_params(axis="y", labelcolor=INK, labelsize=10)


def _title(canvas: Any, text: str) -> None:
    canvas.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)


_CAPTION: dict[str, Any] = {"loc": "left", "fontsize": 10, "color": INK}
_LINES = ("-", "--", "-.", ":")
