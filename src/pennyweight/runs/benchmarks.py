"""Benchmarks on a target: its base and what training made of it, side by side, written down whole."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pennyweight.evaluate.tasks import (
    Tasks,
    TaskScores,
    Wanted,
    differences,
    load_tasks,
    measure_tasks,
)
from pennyweight.evaluate.tasks.table import markdown, shares
from pennyweight.files import disk_faults, make_folder, whole
from pennyweight.report import duration, plain, plot_scores
from pennyweight.runs.target import Arm, target_of

__all__ = ["benchmark"]

SECONDS_BETWEEN_LINES = 5.0


def benchmark(
    named: str,
    wanted: Wanted,
    *,
    model: str | None = None,
    quantization: str | None = None,
    chat: bool = False,
    out: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure `named` (a run's folder, an adapter's, a model) on the tasks wanted.

    `model` names an adapter's base; `quantization` says how a base that no run describes is held;
    `chat` renders prompts as chat, for a run as its training did. Results go to `out`, else into the run's
    folder. Everything that can be refused is, before the model is loaded.
    """
    target = target_of(named, model=model, quantization=quantization)
    tasks = load_tasks(wanted)
    found: dict[str, TaskScores] = {}
    about: dict[str, Any] = {}
    for arm in target.arms(chat=chat):
        about = {"base": arm.base.name, "quantization": arm.base.quantization}
        found[arm.name] = _measured(tasks, arm, say)
        del arm  # a model tuned whole takes the place of its base
    answer = {
        "target": named,
        **about,
        "lm_eval": metadata.version("lm_eval"),
        "chat": chat,
        "limit": wanted.limit,
        **_side_by_side(tasks, found),
    }
    folder = out or (target.path / "benchmarks" / _name(wanted, chat) if target.path else None)
    if folder is not None:
        _write(folder, answer, found)
        answer["written_to"] = str(folder)
    return answer


def _measured(tasks: Tasks, arm: Arm, say: Callable[[str], None]) -> TaskScores:
    return measure_tasks(
        tasks,
        arm.base,
        adapter=arm.adapter,
        renderer=arm.renderer,
        stop_ids=arm.stop_ids,
        told=_teller(arm.name, say),
    )


def _teller(arm: str, say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    """`base: 1,200 of 6,124 continuations scored, eta 0:41`, a line every few seconds."""
    begun: dict[str, float] = {}
    last = time.monotonic()

    def told(doing: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        began = begun.setdefault(doing, now)
        if done == total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            left = (now - began) / done * (total - done)
            eta = f", eta {duration(left)}" if done < total else ""
            say(f"{arm:>5}: {done:,} of {total:,} {doing}{eta}")

    return told


def _side_by_side(tasks: Tasks, found: Mapping[str, TaskScores]) -> dict[str, Any]:
    """Tasks and groups, each metric with a column an arm and, for two, the paired difference."""
    first = next(iter(found.values()))
    changes = differences(found["base"], found["tuned"]) if len(found) == 2 else {}
    by_key = {name: {s.key: s for s in scores.scores} for name, scores in found.items()}
    measured: dict[str, Any] = {}
    asked = {name: place for place, name in enumerate(tasks.wanted.names)}
    for score in sorted(first.scores, key=lambda score: asked.get(score.task, len(asked))):
        entry = measured.setdefault(
            score.task,
            {
                "rows": score.rows,
                "num_fewshot": first.num_fewshot.get(score.task),
                "version": first.versions.get(score.task),
                "source": tasks.sources.get(score.task),
                "children": list(first.children.get(score.task, ())),
                "metrics": {},
            },
        )
        name = score.metric if score.filter == "none" else f"{score.metric},{score.filter}"
        columns = {arm: scores[score.key].to_dict() for arm, scores in by_key.items()}
        if score.key in changes:
            columns["difference"] = changes[score.key].to_dict()
        entry["metrics"][name] = {"higher_is_better": score.higher_is_better, **columns}
    notes = [*tasks.notes]
    if first.cut:
        notes.append(
            f"{first.cut:,} prompts were longer than the model's positions and lost their beginning"
        )
    return {
        "arms": list(found),
        "tasks": measured,
        "notes": notes,
        "programs_limited_to": list(tasks.confinement.holds) if tasks.confinement else None,
    }


def _name(wanted: Wanted, chat: bool) -> str:
    """A folder's name for these settings: the same settings again replace what was measured."""
    parts = ["+".join(wanted.names)]
    parts += [f"limit{wanted.limit}"] if wanted.limit else []
    parts += [f"{wanted.num_fewshot}shot"] if wanted.num_fewshot is not None else []
    parts += ["chat"] if chat else []
    return re.sub(r"[^\w+.-]", "_", "-".join(parts))[:100]


def _row(arm: str, task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """One row of one task: what was asked (a prompt that all choices share once), and what came."""
    asked = sample["arguments"]
    return {
        "arm": arm,
        "task": task,
        "row": sample["doc_id"],
        "filter": sample["filter"],
        "prompts": list(dict.fromkeys(arguments[0] for arguments in asked)),
        "asked": [arguments[1] for arguments in asked if len(arguments) > 1],
        "responses": sample["resps"],
        "read_as": sample["filtered_resps"],
        "target": sample["target"],
        **{metric: sample[metric] for metric in sample["metrics"]},
    }


def _write(folder: Path, answer: Mapping[str, Any], found: Mapping[str, TaskScores]) -> None:
    """`samples.jsonl` (every row, every arm), `table.md`, `scores.png`, and last `results.json`."""
    with disk_faults(
        folder, "results were not written; free space, or name another folder by --out"
    ):
        make_folder(folder)
        (folder / "results.json").unlink(missing_ok=True)
        with (
            whole(folder / "samples.jsonl") as partial,
            partial.open("w", encoding="utf-8") as file,
        ):
            for arm, scores in found.items():
                for task, samples in scores.samples.items():
                    for sample in samples:
                        line = json.dumps(plain(_row(arm, task, sample)), ensure_ascii=False)
                        file.write(line + "\n")
        with whole(folder / "table.md") as partial:
            partial.write_text(markdown(answer), encoding="utf-8")
        plot_scores(shares(answer), folder / "scores.png", title="Share right, with 95 % intervals")
        with whole(folder / "results.json") as partial:
            text = json.dumps(plain(answer), indent=2, allow_nan=False)
            partial.write_text(text + "\n", encoding="utf-8")
