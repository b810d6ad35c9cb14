"""Measured tasks as a table: groups first, their parts below, what they consist of left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["about", "columns", "markdown", "rows", "shares"]

# A group of more tasks than this shows itself alone; results.json has every task.
MOST_PARTS = 8


def columns(answer: Mapping[str, Any]) -> tuple[str, ...]:
    """`task`, `metric`, `rows`, an arm each, and the difference where there are two."""
    change = ("difference",) if len(answer["arms"]) == 2 else ()
    return ("task", "metric", "rows", *answer["arms"], *change)


def rows(answer: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Figures with their 95 % intervals in brackets, under `columns`."""
    tasks = answer["tasks"]
    told = []
    for name, depth in _shown(tasks):
        entry = tasks[name]
        for metric, found in entry["metrics"].items():
            cells = [_figure(found[arm], "value") for arm in answer["arms"]]
            if "difference" in columns(answer):
                cells.append(_figure(found.get("difference"), "difference", signed=True))
            told.append(("  " * depth + name, metric, f"{entry['rows']:,}", *cells))
    return told


def markdown(answer: Mapping[str, Any]) -> str:
    """The table, then what was measured and what to know of it."""
    head = columns(answer)
    ruler = ["---" if i < 2 else "---:" for i in range(len(head))]
    lines = [" | ".join(row) for row in (head, ruler, *rows(answer))]
    facts = [
        f"{answer['target']}; base {answer['base']}, quantization {answer['quantization']}; lm-eval "
        f"{answer['lm_eval']}; prompts {'as chat' if answer['chat'] else 'as plain text'}; 95 % intervals",
        *about(answer),
    ]
    return "".join(f"| {line} |\n" for line in lines) + "\n" + "".join(f"- {f}\n" for f in facts)


def about(answer: Mapping[str, Any]) -> list[str]:
    """Where rows came from, how many examples stood before a question, what limits held."""
    tasks = answer["tasks"]
    lines = []
    for name in _tops(tasks):
        leaves = [tasks[leaf] for leaf in _leaves(tasks, name)]
        sources = dict.fromkeys(str(leaf["source"]) for leaf in leaves)
        shots = sorted({leaf["num_fewshot"] or 0 for leaf in leaves})
        lines.append(f"{name}: {', '.join(sources)}; {' to '.join(map(str, shots))} examples")
    limit = [f"the first {answer['limit']:,} rows of each task"] if answer["limit"] else []
    held = answer["programs_limited_to"]
    code = [f"each program limited to {', '.join(held)}"] if held else []
    return [*lines, *limit, *answer["notes"], *code]


def shares(answer: Mapping[str, Any]) -> list[tuple[str, dict[str, tuple[float, Any]]]]:
    """Of the figures shown those between 0 and 1, for a picture: name, and by arm its value and
    interval."""
    found = []
    for name, _ in _shown(answer["tasks"]):
        for metric, figures in answer["tasks"][name]["metrics"].items():
            arms = {
                arm: (figures[arm]["value"], figures[arm]["interval_95"]) for arm in answer["arms"]
            }
            if all(0 <= value <= 1 for value, _ in arms.values()):
                found.append((f"{name}  {metric}", arms))
    return found


def _tops(tasks: Mapping[str, Any]) -> list[str]:
    held = {child for entry in tasks.values() for child in entry["children"]}
    return [name for name in tasks if name not in held]


def _leaves(tasks: Mapping[str, Any], name: str) -> Iterator[str]:
    children = [child for child in tasks[name]["children"] if child in tasks]
    for child in children:
        yield from _leaves(tasks, child)
    if not children:
        yield name


def _shown(
    tasks: Mapping[str, Any], names: Sequence[str] = (), depth: int = 0
) -> Iterator[tuple[str, int]]:
    """Names and how deep they stand: from those no group holds, down to groups of a few."""
    for name in names or _tops(tasks):
        yield name, depth
        children = [child for child in tasks[name]["children"] if child in tasks]
        if 0 < len(children) <= MOST_PARTS:
            yield from _shown(tasks, children, depth + 1)


def _figure(found: Mapping[str, Any] | None, name: str, *, signed: bool = False) -> str:
    if found is None:
        return ""
    value, interval = found[name], found["interval_95"]
    told = f"{value:+.4f}" if signed else f"{value:.4f}"
    return told + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")
