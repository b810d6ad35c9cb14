"""The page of a run on a CPU: gate, steps side by side, what was left out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.in_turn import spread
from benchmarks.machine import in_words

__all__ = ["draw", "rows", "shut", "written"]

OURS = "pennyweight"
EXPLAINED = """\
Each side runs in processes of its own, in turn; a figure is the median over the processes, ± half
the distance from the slowest to the fastest. `tokens/s` counts tokens of documents, never padding;
`trained` those that are predicted in the loss. `floor`: the step's FLOPs (docs/performance.md, none
for what is recomputed) over the rate of a plain product of the model's size in PRODUCT, measured
right after the step in the same process, as a share of the step's time. `memory`: the peak while it steps,
of the process or of the GPU's allocations; `added`: over what was held at rest between steps,
weights, adapter and optimizer included. `start`: from the
start of the process's imports to the end of the first step, load and quantization included; `load`
alone beside it. The ratio is to the fastest of the peers with those tokens, in whichever type."""


def rows(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """One for each shape, case and side: medians over its processes; a fault where all failed."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in facts["steps"]:
        layout = one["layout"] + (", recomputed" if one.get("recompute") else "")
        dtype = one.get("dtype", "float32")
        key = one["shape"], one["mode"], one["tokens"], layout, one["side"], dtype
        groups.setdefault(key, []).append(one)
    found = []
    for (shape, mode, tokens, layout, side, dtype), results in groups.items():
        row = {"shape": shape, "mode": mode, "tokens": tokens, "layout": layout, "side": side}
        row["dtype"] = dtype
        good = [one for one in results if "fault" not in one]
        if not good:
            found.append(row | {"fault": results[-1]["fault"]})
            continue

        def middle(name: str, of: Sequence[dict[str, Any]] = good) -> float:
            return statistics.median([one[name] for one in of])

        step = middle("step_s")
        found.append(
            row
            | {
                "processes": len(good),
                "step_s": step,
                "spread": spread([one["step_s"] for one in good]),
                "tokens_per_s": middle("real_tokens") / step,
                "trained_per_s": middle("trained_tokens") / step,
                "floor": middle("floor_s") / step,
                "gflops": middle("product_flops") / 1e9,
                "peak_bytes": middle("peak_bytes"),
                "added_bytes": middle("peak_bytes") - middle("rest_bytes"),
                "load_s": middle("load_s"),
                "start_s": middle("import_s") + middle("load_s") + middle("first_step_s"),
                "loss": good[0]["losses"][0],
                "threads": int(middle("threads")),
            }
        )
    return found


def shut(facts: dict[str, Any]) -> list[str]:
    """The checks that do not hold."""
    return [check["what"] for check in facts["gate"] if not check["holds"]]


def written(facts: dict[str, Any]) -> str:
    lines = [f"# {facts.get('title', 'Steps on a CPU, beside the peers')}", ""]
    if facts["quick"]:
        lines += ["A trial on a toy: its figures say nothing.", ""]
    if facts["gate"]:
        lines += ["| parity gate | found | at most | |", "|---|---:|---:|---|"]
        lines += [
            f"| {c['what']} | {c['found']:.2g} | {c['bound']:.2g} | {'holds' if c['holds'] else 'SHUT'} |"
            for c in facts["gate"]
        ]
        lines.append("")
    if closed := shut(facts):
        lines += [f"**The gate is shut, so no speed below counts: {'; '.join(closed)}.**", ""]
    if facts["steps"]:
        said = EXPLAINED.replace("PRODUCT", facts.get("product", "the row's type"))
        lines += [*said.splitlines(), ""]
    found = rows(facts)
    for shape in dict.fromkeys(row["shape"] for row in found):
        lines += [f"## {shape} (hidden size x layers)", "", *_table(found, shape), ""]
    lines += [f"- {note}" for note in [*facts["failed"], *facts["notes"]]]
    lines += [""] if facts["failed"] or facts["notes"] else []
    maker = facts.get("made_by", "python -m benchmarks cpu")
    return "\n".join(
        [*lines, in_words(facts["circumstances"]), "", f"`{maker}` makes this page.", ""]
    )


def _table(found: Sequence[dict[str, Any]], shape: str) -> list[str]:
    lines = [
        "| mode | tokens | side | ms a step | tokens/s | trained/s | floor | ratio | memory MB | added MB | load s | start s | n |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    of_shape = [row for row in found if row["shape"] == shape]
    for case in dict.fromkeys((row["mode"], row["tokens"], _documents(row)) for row in of_shape):
        alike = [r for r in of_shape if (r["mode"], r["tokens"], _documents(r)) == case]
        lines += [_line(row, alike) for row in sorted(alike, key=lambda r: r["side"] != OURS)]
    return lines


def _side(row: dict[str, Any]) -> str:
    return row["side"] + (", bf16" if row["dtype"] == "bfloat16" else "")


def _documents(row: dict[str, Any]) -> str:
    return row["layout"].split()[0]


def _line(row: dict[str, Any], alike: Sequence[dict[str, Any]]) -> str:
    said = row["layout"].removeprefix("even").removeprefix(", ")
    cells = [row["mode"], f"{row['tokens']:,} {said}".strip(), _side(row)]
    if "fault" in row:
        return "| " + " | ".join([*cells, row["fault"].replace("|", "/"), *[""] * 9]) + " |"
    peers = [r["tokens_per_s"] for r in alike if r["side"] != OURS and "fault" not in r]
    ratio = ""
    if row["side"] == OURS and peers:
        ratio = f"{row['tokens_per_s'] / max(peers):.2f}"
    cells += [
        f"{row['step_s'] * 1e3:,.0f} ± {row['spread']:.0%}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['trained_per_s']:,.0f}",
        f"{row['floor']:.0%}",
        ratio,
        f"{row['peak_bytes'] / 1e6:,.0f}",
        f"{row['added_bytes'] / 1e6:,.0f}",
        f"{row['load_s']:.1f}",
        f"{row['start_s']:.1f}",
        str(row["processes"]),
    ]
    return "| " + " | ".join(cells) + " |"


def draw(facts: dict[str, Any], path: Path) -> None:
    """Tokens a second of every case, side by side; nothing where matplotlib is not installed."""
    good = [row for row in rows(facts) if "fault" not in row]
    try:
        import matplotlib
    except ImportError:
        return
    if not good:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(_name(row) for row in good))
    sides = list(dict.fromkeys(_side(row) for row in good))
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.45 * len(cases)))
    for number, side in enumerate(sides):
        mine = [(cases.index(_name(r)), r["tokens_per_s"]) for r in good if _side(r) == side]
        places = [place + (number - len(sides) / 2) * 0.8 / len(sides) for place, _ in mine]
        axes.barh(places, [speed for _, speed in mine], 0.8 / len(sides), label=side)
    axes.set_yticks(range(len(cases)), cases)
    axes.invert_yaxis()
    axes.set_xlabel("tokens of documents a second")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _name(row: dict[str, Any]) -> str:
    return f"{row['shape']} {row['mode']} {row['tokens']:,} {_documents(row)}"
