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
# Published with the data: PEFT 0.21.2 (+ bitsandbytes 0.50.2), one seed each, same settings.
PEFT = {"full": 1.281, "lora": 1.330, "qlora": 1.372}
PEFT_ZERO_SHOT = {"full": 4.196, "lora": 4.196, "qlora": 4.356}
TITLES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA (NF4 + DQ)"}
COLOURS = {"full": "#2b6cb0", "lora": "#5b8c5a", "qlora": "#d1495b"}


def write(arms: Sequence[Arm], peers: Sequence[Arm], folder: Path) -> None:
    """Write `yardstick.md`, `.json` and `.png` into `folder`; `peers` are the arms PEFT ran here."""
    if not arms:
        return
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _draw(arms, folder / "yardstick.png")
    stored = {"arms": list(arms), "peers": list(peers)}
    (folder / "yardstick.json").write_text(json.dumps(stored) + "\n")
    (folder / "yardstick.md").write_text(_page(arms, {p["method"]: p for p in peers}, drawn))


def _page(arms: Sequence[Arm], peers: Mapping[str, Arm], drawn: bool) -> str:
    seeds = sorted({arm["seed"] for arm in arms})
    named = [f"seed {seed}" for seed in seeds]
    beside = ["PEFT here, seed 0"] if peers else []
    losses = [["method", "zero-shot", *named, "mean", "limit", "within", *beside]]
    costs = [["method", "trained parameters", "seconds", "tokens/s", "peak memory, MiB"]]
    for method in METHODS:
        of = {arm["seed"]: arm for arm in arms if arm["method"] == method}
        if of:
            losses.append(_loss_row(method, of, seeds, peers))
            costs.append(_cost_row(method, list(of.values())))
    first = arms[0]
    parts = [
        "# The yardstick: E2E on stories260k",
        "Nats per response token, the stop token among them, on the first reference of each of the "
        "630 test inputs, none of which is in the training rows; every arm from its YAML in "
        f"`benchmarks/yardstick/`, {first['steps']} steps of 16 pairs.",
        _table(losses),
        "Within: every seed at or below the limit. The models were opened again from their output "
        f"folders and measured once more; the largest change of a loss by that is {_reopened(arms):.1g}.",
        _without_stop(arms),
        *_published(peers),
        "![training loss](yardstick.png)" if drawn else "",
        "## What it took",
        _table(costs),
        "Means over the seeds, peak memory the largest. Seconds are those of the optimizer steps; "
        f"the machine did other work at the same time (load average {_loads(arms)} on "
        f"{first['circumstances']['cores']} cores), so they bound the cost from above and compare "
        "nothing.",
        "## Where",
        in_words(first["circumstances"]),
        "`python -m benchmarks.yardstick --data PATH` makes all of this (PEFT's column: "
        "`python -m benchmarks.yardstick_peer --data PATH`, before it); every number is in "
        "`yardstick.json`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _without_stop(arms: Sequence[Arm]) -> str:
    said = []
    for method in METHODS:
        of = [arm["after_without_stop_reopened"] for arm in arms if arm["method"] == method]
        if of:
            said.append(f"{TITLES[method]} {mean(of):.3f}")
    return f"Means over the words of the response alone, without the stop token: {', '.join(said)}."


def _published(peers: Mapping[str, Arm]) -> list[str]:
    """PEFT's figures as published with the data, and why they are not quite of the same tokens."""
    rows = [["", "full", "LoRA", "QLoRA (NF4 + DQ)"]]
    told = [("PEFT 0.21.2 as published, zero-shot", PEFT_ZERO_SHOT), ("tuned", PEFT)]
    rows += [[name, *(f"{of[method]:.3f}" for method in METHODS)] for name, of in told]
    for name, key in (("PEFT here, zero-shot", "before"), ("tuned", "after")):
        if peers:
            of = {method: f"{peers[method][key]:.3f}" for method in peers}
            rows.append([name, *(of.get(method, "") for method in METHODS)])
    return [
        "## PEFT",
        _table(rows),
        "The limits were set from the published row. Its zero-shot loss is not that of the plain "
        "model on these tokens, so its rows or tokens were slightly others; like with like is the "
        "row measured here, on the same rows in the same order, with the same initial A and B as "
        "our seed 0. Curves step by step: [parity_peft](parity_peft.md).",
    ]


def _loss_row(
    method: str, of: Mapping[int, Arm], seeds: Sequence[int], peers: Mapping[str, Arm]
) -> list[str]:
    after = [arm["after"] for arm in of.values()]
    beside = [f"{peers[method]['after']:.3f}" if method in peers else ""] if peers else []
    return [
        TITLES[method],
        f"{next(iter(of.values()))['before']:.3f}",
        *(f"{of[seed]['after']:.3f}" if seed in of else "" for seed in seeds),
        f"**{mean(after):.3f}**",
        f"{LIMITS[method]:.2f}",
        "yes" if max(after) <= LIMITS[method] else "NO",
        *beside,
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
    names = ("before", "after")
    return max(abs(arm[name] - arm[f"{name}_reopened"]) for arm in arms for name in names)


def _loads(arms: Sequence[Arm]) -> str:
    loads = [arm["circumstances"]["load_average"] for arm in arms]
    return f"{min(loads)} to {max(loads)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def _draw(arms: Sequence[Arm], path: Path) -> bool:
    """Training losses, smoothed over about 16 steps, and the held-out loss at the end; False where
    matplotlib is absent."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    from pennyweight.report.plot import smoothed

    figure = Figure(figsize=(8, 4.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    for arm in arms:
        first = arm is next(other for other in arms if other["method"] == arm["method"])
        axes.plot(
            range(1, len(arm["losses"]) + 1),
            smoothed(arm["losses"], 16),
            color=COLOURS[arm["method"]],
            linewidth=1.2,
            alpha=0.8,
            label=f"{TITLES[arm['method']]}, training" if first else None,
        )
        axes.plot(
            len(arm["losses"]) + 4,
            arm["after"],
            color=COLOURS[arm["method"]],
            marker="o",
            markersize=4,
            linestyle="none",
            label=f"{TITLES[arm['method']]}, held out" if first else None,
        )
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per response token")
    axes.set_ylim(top=2.5)
    axes.grid(color="#e4e7eb")
    axes.legend(frameon=False)
    figure.savefig(path)
    return True
