"""The yardstick's tables and picture, from the results of its arms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.e2e import METHODS
from benchmarks.machine import in_words

__all__ = ["write"]

Arm = Mapping[str, Any]

LIMITS = {"full": 1.35, "lora": 1.40, "qlora": 1.44}
# PEFT 0.21.2 (+ bitsandbytes 0.50.2 for QLoRA), one seed each, same data and settings.
PEFT = {"full": 1.281, "lora": 1.330, "qlora": 1.372}
PEFT_ZERO_SHOT = {"full": 4.196, "lora": 4.196, "qlora": 4.356}
TITLES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA (NF4 + DQ)"}
COLOURS = {"full": "#2b6cb0", "lora": "#5b8c5a", "qlora": "#d1495b"}


def write(arms: Sequence[Arm], folder: Path) -> None:
    """Write `yardstick.md`, `.json` and `.png` into `folder`."""
    if not arms:
        return
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _draw(arms, folder / "yardstick.png")
    (folder / "yardstick.json").write_text(json.dumps(list(arms), indent=1) + "\n")
    (folder / "yardstick.md").write_text(_page(arms, drawn))


def _page(arms: Sequence[Arm], drawn: bool) -> str:
    seeds = sorted({arm["seed"] for arm in arms})
    named = [f"seed {seed}" for seed in seeds]
    losses = [["method", "zero-shot", *named, "mean", "limit", "within", "PEFT, one seed"]]
    other = [["method", "zero-shot", *named, "mean", "PEFT zero-shot", "PEFT tuned"]]
    costs = [["method", "trained parameters", "seconds", "tokens/s", "peak memory, MiB"]]
    for method in METHODS:
        of = {arm["seed"]: arm for arm in arms if arm["method"] == method}
        if not of:
            continue
        losses.append(_loss_row(method, of, seeds))
        other.append(_row_without_stop(method, of, seeds))
        costs.append(_cost_row(method, list(of.values())))
    first = arms[0]
    parts = [
        "# The yardstick: E2E on stories260k",
        "Nats per response token on the first reference of each of the 630 test inputs, none of "
        "which is in the training rows; every arm from its YAML in `benchmarks/yardstick/`, "
        f"{first['steps']} steps of 16 pairs. The stop token counts as a token of the response.",
        _table(losses),
        "Within: every seed at or below the limit.",
        "## Without the stop token",
        "The same models, measured on the words of the response alone.",
        _table(other),
        "Both tables' models were opened again from their output folders for the second; the "
        f"largest change of a loss by that is {_reopened(arms):.1g}.",
        "## What it took",
        _table(costs),
        "Means over the seeds. Seconds are those of the optimizer steps; the machine did other "
        f"work at the same time (load average {_loads(arms)} on {first['circumstances']['cores']} "
        "cores), so they bound the cost from above and compare nothing.",
        "![training loss](yardstick.png)" if drawn else "",
        "## Where",
        in_words(first["circumstances"]),
        "`python -m benchmarks.yardstick --data PATH` makes all of this; the numbers of each arm "
        "are in `yardstick.json`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _loss_row(method: str, of: Mapping[int, Arm], seeds: Sequence[int]) -> list[str]:
    after = [arm["after"] for arm in of.values()]
    return [
        TITLES[method],
        f"{next(iter(of.values()))['before']:.3f}",
        *(f"{of[seed]['after']:.3f}" if seed in of else "" for seed in seeds),
        f"**{mean(after):.3f}**",
        f"{LIMITS[method]:.2f}",
        "yes" if max(after) <= LIMITS[method] else "NO",
        f"{PEFT[method]:.3f}",
    ]


def _row_without_stop(method: str, of: Mapping[int, Arm], seeds: Sequence[int]) -> list[str]:
    after = [arm["after_without_stop_reopened"] for arm in of.values()]
    return [
        TITLES[method],
        f"{next(iter(of.values()))['before_without_stop_reopened']:.3f}",
        *(f"{of[seed]['after_without_stop_reopened']:.3f}" if seed in of else "" for seed in seeds),
        f"{mean(after):.3f}",
        f"{PEFT_ZERO_SHOT[method]:.3f}",
        f"{PEFT[method]:.3f}",
    ]


def _cost_row(method: str, arms: Sequence[Arm]) -> list[str]:
    peak = [arm["peak_memory_bytes"] for arm in arms if arm["peak_memory_bytes"] is not None]
    return [
        TITLES[method],
        f"{arms[0]['trained_parameters']:,}",
        f"{mean(arm['train_seconds'] for arm in arms):.0f}",
        f"{mean(arm['tokens_per_second'] for arm in arms):,.0f}",
        f"{max(peak) / 2**20:,.0f}" if peak else "not told",
    ]


def _reopened(arms: Sequence[Arm]) -> float:
    return max(abs(arm[name] - arm[f"{name}_reopened"]) for arm in arms for name in WHEN)


WHEN = ("before", "after")


def _loads(arms: Sequence[Arm]) -> str:
    loads = [arm["circumstances"]["load_average"] for arm in arms]
    return f"{min(loads)} to {max(loads)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def _draw(arms: Sequence[Arm], path: Path) -> bool:
    """Training losses, smoothed over about 16 steps; False where matplotlib is absent."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    from pennyweight.report.plot import smoothed

    figure = Figure(figsize=(8, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    for arm in arms:
        first = arm is next(other for other in arms if other["method"] == arm["method"])
        axes.plot(
            range(1, len(arm["losses"]) + 1),
            smoothed(arm["losses"], 16),
            color=COLOURS[arm["method"]],
            linewidth=1.2,
            alpha=0.8,
            label=TITLES[arm["method"]] if first else None,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss, nats per response token")
    axes.set_ylim(1.1, 2.4)
    axes.grid(color="#e4e7eb")
    axes.legend(frameon=False)
    figure.savefig(path)
    return True
