"""The page of the comparison with PEFT: weights, differences of the curves, cost, and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import circumstances, in_words
from benchmarks.peft_oracle import Curve

__all__ = ["KERNEL_ROUNDING", "Side", "WeightCheck", "write"]

PACKAGES = ("pennyweight", "torch", "transformers", "peft", "bitsandbytes")
TITLES = {"none": "LoRA (float32)", "nf4": "QLoRA (NF4 + DQ)"}
OURS, PEER = "Pennyweight", "PEFT"
DRIFTS = ("PEFT, rows of each batch reversed", "PEFT in float64")
EARLY_STEPS = 20
# Above this share of the largest weight a dequantization kernel is wrong, not rounded.
KERNEL_ROUNDING = 1e-6
LEAST = 1e-9  # nats; what two losses that are equal to the last bit are drawn at


@dataclass(frozen=True, slots=True)
class WeightCheck:
    """One layer: is our weight the one that bitsandbytes' codes stand for, to the bit; and which
    share of values does bitsandbytes' own kernel get otherwise, how far relative to the largest."""

    path: str
    shape: tuple[int, int]
    equal: bool
    kernel_wrong: float
    kernel_apart: float


@dataclass(frozen=True, slots=True)
class Side:
    """All curves of one quantization; `first_logits` is the relative difference before training,
    `held_out` the loss of ours and theirs after it on the yardstick's 630 rows."""

    quantization: str
    steps: int
    curves: Mapping[str, Curve]
    checks: Sequence[WeightCheck]
    first_logits: float
    held_out: tuple[float, float]


def write(sides: Sequence[Side], folder: Path) -> None:
    """Write `parity_peft.md`, `.json` and `.png` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = circumstances(PACKAGES)
    drawn = _draw(sides, folder / "parity_peft.png")
    stored = {"circumstances": facts, "sides": [asdict(side) for side in sides]}
    (folder / "parity_peft.json").write_text(json.dumps(stored) + "\n")
    parts = [
        "# Loss curves beside PEFT",
        "The yardstick's rows, model and settings; the same rows in the same order, the same "
        "initial A and B (ours, saved and loaded by PEFT). PEFT runs padded batches in a plain "
        "torch loop; Pennyweight runs the documents back to back without padding.",
        *(part for side in sides for part in _section(side)),
        "![both curves, and their distance](parity_peft.png)" if drawn else "",
        "## Where",
        in_words(facts),
        f"The machine did other work at the same time (load average {facts['load_average']}); "
        "the times are no claim.",
        "`python -m benchmarks.parity_peft --data PATH` makes all of this; the curves are in "
        "`parity_peft.json`.",
    ]
    (folder / "parity_peft.md").write_text("\n\n".join(part for part in parts if part) + "\n")


def _section(side: Side) -> list[str]:
    peer = side.curves[PEER].losses
    pairs = [(f"{OURS} - PEFT", side.curves[OURS].losses, peer)]
    pairs += [(f"{name} - PEFT", side.curves[name].losses, peer) for name in DRIFTS]
    exact = side.curves[DRIFTS[1]].losses
    pairs.append((f"{OURS} - PEFT in float64", side.curves[OURS].losses, exact))
    rows = [["difference of the loss", "step 1", f"max, steps 1 to {EARLY_STEPS}", "max", "mean"]]
    for name, left, right in pairs:
        apart = [abs(a - b) for a, b in zip(left, right, strict=True)]
        figures = (apart[0], max(apart[:EARLY_STEPS]), max(apart), sum(apart) / len(apart))
        rows.append([name, *(f"{figure:.1e}" for figure in figures)])
    furthest = _furthest(side, OURS, PEER)
    reversed_rows, double = (furthest / max(_furthest(side, name, PEER), LEAST) for name in DRIFTS)
    return [
        f"## {TITLES[side.quantization]}, {side.steps} steps",
        *_weights(side.checks),
        _table(rows),
        f"Nats per response token; the loss goes from {peer[0]:.3f} to {peer[-1]:.3f}. Our "
        f"largest difference is {reversed_rows:.2g} times PEFT's from itself with rows reversed, and "
        f"{double:.2g} times PEFT's from itself in float64. "
        f"Before training, logits differ by {side.first_logits:.1e} of the largest. "
        f"After it the 630 held-out rows have {side.held_out[0]:.4f} here and "
        f"{side.held_out[1]:.4f} with PEFT.",
        _table(_costs(side)),
    ]


def _furthest(side: Side, one: str, other: str) -> float:
    pairs = zip(side.curves[one].losses, side.curves[other].losses, strict=True)
    return max(abs(a - b) for a, b in pairs)


def _weights(checks: Sequence[WeightCheck]) -> list[str]:
    if not checks:
        return []
    equal = sum(check.equal for check in checks)
    rows = [["layers of shape", "our weight equals", "kernel differs in", "by at most"]]
    for shape in dict.fromkeys(check.shape for check in checks):
        of = [check for check in checks if check.shape == shape]
        rows.append(
            [
                f"{len(of)} of {shape[0]} x {shape[1]}",
                f"{sum(check.equal for check in of)}, to the bit",
                f"{100 * max(check.kernel_wrong for check in of):.1f} % of values",
                f"{100 * max(check.kernel_apart for check in of):.1f} % of the largest",
            ]
        )
    wrong = sum(check.kernel_apart > KERNEL_ROUNDING for check in checks)
    said = (
        "Our dequantized weight equals the one that bitsandbytes' codes, levels and scales stand "
        f"for (its definition, computed in plain torch) in {equal} of {len(checks)} layers, to "
        "the bit. "
    )
    if wrong:
        said += (
            f"In {wrong} layers bitsandbytes' own kernel for this processor gives other values, so "
            "PEFT trains here beside the right weights, held dense."
        )
    else:
        said += (
            "So does what bitsandbytes' own kernel makes of them on this processor; PEFT trains "
            "here beside its `Linear4bit`, and in float64 beside the same weights held dense."
        )
    return [said, _table(rows)]


def _costs(side: Side) -> list[list[str]]:
    rows = [["", "ms a step (median)", "tokens/s", "padding"]]
    for name, curve in side.curves.items():
        if name in DRIFTS:
            continue
        rows.append(
            [
                name,
                f"{1e3 * median(curve.seconds):.0f}",
                f"{curve.tokens / sum(curve.seconds):,.0f}",
                f"{100 * (1 - curve.tokens / curve.positions):.0f} %",
            ]
        )
    return rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def _draw(sides: Sequence[Side], path: Path) -> bool:
    """Above both curves, below their distance beside PEFT's from itself; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(5.2 * len(sides), 5.6), dpi=100, layout="constrained")
    grid: Any = figure.subplots(2, len(sides), sharex=True, squeeze=False)
    for side, upper, lower in zip(sides, grid[0], grid[1], strict=True):
        numbers = range(1, side.steps + 1)
        upper.plot(numbers, side.curves[PEER].losses, color="#d1495b", linewidth=2.4, label=PEER)
        upper.plot(numbers, side.curves[OURS].losses, color="#1f2933", linewidth=0.8, label=OURS)
        upper.set_title(TITLES[side.quantization], loc="left", fontsize=11)
        upper.set_ylabel("loss, nats per response token")
        peer = side.curves[PEER].losses
        lines = ((OURS, "#1f2933"), (DRIFTS[0], "#e8a33d"), (DRIFTS[1], "#2b6cb0"))
        for name, colour in lines:
            pairs = zip(side.curves[name].losses, peer, strict=True)
            apart = [max(abs(a - b), LEAST) for a, b in pairs]
            lower.plot(numbers, apart, color=colour, linewidth=0.9, label=name)
        lower.set_yscale("log")
        lower.set_ylabel("distance from PEFT's loss")
        lower.set_xlabel("optimizer step")
        for axes in (upper, lower):
            axes.grid(color="#e4e7eb")
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)
    return True
