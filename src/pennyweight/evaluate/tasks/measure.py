"""One reader measured on tasks, and two readers of the same rows side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pennyweight.data.chat import Renderer
from pennyweight.evaluate.intervals import (
    NORMAL_QUANTILE_975,
    Difference,
    Interval,
    bootstrap,
    wilson,
)
from pennyweight.evaluate.tasks.catalogue import Tasks, quietly
from pennyweight.model import BaseModel

__all__ = ["Score", "TaskScores", "differences", "measure_tasks"]

FEWSHOT_SEED = 1234  # lm-eval's own, so that the same examples stand before the same questions
BOOTSTRAP_DRAWS = 1000
ONE_PROCESS = "DISABLE_MULTIPROC"  # lm-eval's switch: no fork of a process that holds a model

Told = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Score:
    """One metric of one task or group, as lm-eval computes it.

    `by_row`: the metric of each row, by (task, row), where it is a mean over rows; what two readers
    are compared by. `stderr` is lm-eval's; `interval` holds at 95 %.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    interval: Interval | None
    rows: int
    higher_is_better: bool | None
    by_row: Mapping[tuple[str, int], float] | None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.metric, self.filter

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "stderr": self.stderr, "interval_95": self.interval}


@dataclass(frozen=True, slots=True)
class TaskScores:
    """What one reader reached; `samples` holds every row with its prompt, answer and metrics."""

    scores: tuple[Score, ...]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    children: Mapping[str, Sequence[str]]
    num_fewshot: Mapping[str, int]
    versions: Mapping[str, Any]
    cut: int


def measure_tasks(
    tasks: Tasks,
    base: BaseModel,
    *,
    adapter: str | None = None,
    renderer: Renderer | None = None,
    stop_ids: Sequence[int] = (),
    told: Told = lambda doing, done, total: None,
) -> TaskScores:
    """Measure the base, or one of its adapters; with a `renderer` prompts are rendered as chat.

    Called again with the same tasks it asks the same questions with the same examples.
    """
    from lm_eval.evaluator import evaluate

    from pennyweight.evaluate.tasks.lm import ResidentLM

    stops = [*stop_ids, *(renderer.stop_ids if renderer is not None else ())]
    lm = ResidentLM(base, adapter=adapter, renderer=renderer, stop_ids=stops, told=told)
    for task in tasks.loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    with quietly(), _one_process():
        found = evaluate(
            lm,
            tasks.loaded,
            limit=tasks.wanted.limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            apply_chat_template=renderer is not None,
            fewshot_as_multiturn=renderer is not None,
            confirm_run_unsafe_code=tasks.confinement is not None,
        )
    return TaskScores(
        scores=tuple(_scores(found)),
        samples=found["samples"],
        children=found["group_subtasks"],
        num_fewshot=found["n-shot"],
        versions=found["versions"],
        cut=lm.cut,
    )


@contextmanager
def _one_process() -> Iterator[None]:
    before = os.environ.get(ONE_PROCESS)
    os.environ[ONE_PROCESS] = "1"
    try:
        yield
    finally:
        del os.environ[ONE_PROCESS]
        if before is not None:
            os.environ[ONE_PROCESS] = before


def _scores(found: Mapping[str, Any]) -> Iterator[Score]:
    for task, figures in found["results"].items():
        better = found["higher_is_better"].get(task, {})
        for key, value in figures.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = figures.get(f"{metric}_stderr,{name}")
            stderr = float(stderr) if isinstance(stderr, int | float) else None
            by_row = _by_row(found, task, metric, name, float(value))
            yield Score(
                task=task,
                metric=metric,
                filter=name,
                value=float(value),
                stderr=stderr,
                interval=_interval(float(value), stderr, by_row),
                rows=int(figures["sample_len"]),
                higher_is_better=better.get(metric),
                by_row=by_row,
            )


def _by_row(
    found: Mapping[str, Any], task: str, metric: str, name: str, value: float
) -> dict[tuple[str, int], float] | None:
    """The metric of each row below a task or group, if its mean is the figure."""
    rows = {
        (leaf, int(sample["doc_id"])): float(sample[metric])
        for leaf in _leaves(found["group_subtasks"], task)
        for sample in found["samples"].get(leaf, ())
        if sample["filter"] == name and isinstance(sample.get(metric), int | float)
    }
    if not rows or not math.isclose(math.fsum(rows.values()) / len(rows), value, abs_tol=1e-9):
        return None
    return rows


def _leaves(children: Mapping[str, Sequence[str]], name: str) -> Iterator[str]:
    for child in children.get(name, ()):
        yield from _leaves(children, child)
    if not children.get(name):
        yield name


def _interval(
    value: float, stderr: float | None, by_row: Mapping[tuple[str, int], float] | None
) -> Interval | None:
    """Of a share of rows Wilson's; of other figures the normal one."""
    if by_row is not None and set(by_row.values()) <= {0.0, 1.0}:
        return wilson(round(math.fsum(by_row.values())), len(by_row))
    if stderr is None:
        return None
    return value - NORMAL_QUANTILE_975 * stderr, value + NORMAL_QUANTILE_975 * stderr


def differences(before: TaskScores, after: TaskScores) -> dict[tuple[str, str, str], Difference]:
    """After minus before, row by row, for every metric that is a mean over rows."""
    old = {score.key: score for score in before.scores}
    changes = {}
    for score in after.scores:
        one, two = old[score.key].by_row, score.by_row
        if one is None or two is None:
            continue
        assert one.keys() == two.keys(), "both readers were asked the same rows"
        by_row = [two[row] - one[row] for row in one]
        mean = math.fsum(by_row) / len(by_row)
        changes[score.key] = Difference(mean, bootstrap(by_row), len(by_row))
    return changes
