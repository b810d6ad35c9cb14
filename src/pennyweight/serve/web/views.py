"""Jobs as people read them: a name, where it stands, and its figures, taken from what the store keeps."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pennyweight.plan.table import as_duration
from pennyweight.serve.records import ENDED, LIVE, EventRecord, JobRecord
from pennyweight.serve.store import Store

__all__ = ["Figures", "JobView", "figures_of", "job_views", "said"]

NEWEST = 4  # events of figures among which a step's is, whatever was measured after it
_SAID = {
    "validating_files": "Reading the rows",
    "queued": "Waiting for its turn",
    "running": "Training",
    "paused": "Paused",
    "succeeded": "Ready",
    "failed": "Failed",
    "cancelled": "Cancelled",
}
_SETTINGS = {
    "n_epochs": "Passes",
    "batch_size": "Rows in a step",
    "learning_rate_multiplier": "Learning rate multiplier",
    "learning_rate": "Learning rate",
    "max_steps": "Most steps",
    "r": "Rank",
}


def said(status: str) -> str:
    return _SAID.get(status, status)


@dataclass(frozen=True, slots=True)
class Figures:
    """What a job reported: `(step, loss in training)` and `(step, held-out loss)`, in order.

    A held-out loss at step 0 is the bare base's.
    """

    trained: tuple[tuple[int, float], ...] = ()
    held_out: tuple[tuple[int, float], ...] = ()
    total_steps: int = 0

    @property
    def step(self) -> int:
        return self.trained[-1][0] if self.trained else 0

    @property
    def loss_now(self) -> float | None:
        return self.trained[-1][1] if self.trained else None

    @property
    def before(self) -> float | None:
        return next((loss for step, loss in self.held_out if step == 0), None)

    @property
    def after(self) -> float | None:
        return next((loss for step, loss in reversed(self.held_out) if step > 0), None)

    def table(self) -> list[tuple[int, float | None, float | None]]:
        """A line a step: its loss in training, and on held-out rows where it was measured."""
        trained, held = dict(self.trained), dict(self.held_out)
        return [(step, trained.get(step), held.get(step)) for step in sorted({*trained, *held})]

    def sentence(self) -> str:
        """The curve in words."""
        if not self.trained:
            return "The curve begins with the first step."
        told = f"Step {self.step}: loss {self.loss_now:.4g} in training"
        if self.after is not None:
            told += f", {self.after:.4g} on held-out rows"
            if self.before is not None:
                told += f" (the bare base {self.before:.4g})"
        return told + "."


def figures_of(events: Iterable[EventRecord]) -> Figures:
    """The figures among a job's events, oldest first; what is no number is passed over."""
    trained: dict[int, float] = {}
    held: dict[int, float] = {}
    total = 0
    for event in events:
        if event.kind != "metrics":
            continue
        step = event.data.get("step")
        if not isinstance(step, int):
            continue
        total = max(total, _count(event.data.get("total_steps")))
        for name, series in (("train_loss", trained), ("valid_loss", held)):
            loss = event.data.get(name)
            if isinstance(loss, int | float):
                series[step] = float(loss)
    return Figures(tuple(sorted(trained.items())), tuple(sorted(held.items())), total)


@dataclass(frozen=True, slots=True)
class JobView:
    """One job for a page. `settled`: what was left to the server is known. `acts`: what may be done
    with it now, as (route, label, class)."""

    id: str
    name: str
    status: str
    said: str
    live: bool
    settled: bool
    created_at: int
    step: int
    steps: int
    loss_now: float | None
    loss_before: float | None
    loss_after: float | None
    tokens: int
    model: str | None
    training_file: str
    seed: int
    settings: tuple[tuple[str, str], ...]
    acts: tuple[tuple[str, str, str], ...]
    error: tuple[str, ...]
    left: str | None
    took: str | None

    @classmethod
    def of(cls, job: JobRecord, figures: Figures, filename: str) -> JobView:
        return cls(
            id=job.id,
            name=job.suffix or job.id,
            status=job.status,
            said=said(job.status),
            live=job.status in LIVE,
            settled=job.status not in LIVE or "auto" not in job.hyperparameters.values(),
            created_at=job.created_at,
            step=figures.step,
            steps=figures.total_steps,
            loss_now=figures.loss_now,
            loss_before=figures.before,
            loss_after=figures.after,
            tokens=job.trained_tokens,
            model=job.fine_tuned_model if job.status == "succeeded" else None,
            training_file=filename,
            seed=job.seed,
            settings=_settings(job),
            acts=_acts(job.status),
            error=tuple(str(job.error.get("message", "")).splitlines()),
            left=_left(job),
            took=_took(job),
        )


def job_views(store: Store, jobs: Sequence[JobRecord], filenames: dict[str, str]) -> list[JobView]:
    """Views of several jobs, each as its last figures tell it: where it stands, not how it came there."""
    views = []
    for job in jobs:
        where = {"job_id": job.id, "kind": "metrics"}
        newest, _ = store.listed(EventRecord, where, limit=NEWEST)
        name = filenames.get(job.training_file, job.training_file)
        views.append(JobView.of(job, figures_of(reversed(newest)), name))
    return views


def _settings(job: JobRecord) -> tuple[tuple[str, str], ...]:
    given = {**job.hyperparameters}
    for group in ("lora", "train"):
        given |= job.asked.get(group) or {}
    known = {label: given.get(key) for key, label in _SETTINGS.items()}
    return tuple((k, _short(v)) for k, v in known.items() if v not in (None, "auto"))


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _acts(status: str) -> tuple[tuple[str, str, str], ...]:
    if status in ENDED:
        return ()
    first = ("resume", "Resume", "main") if status == "paused" else ("pause", "Pause", "")
    return (first, ("cancel", "Cancel", "danger"))


def _left(job: JobRecord) -> str | None:
    if job.status != "running" or job.estimated_finish is None:
        return None
    return as_duration(max(1, job.estimated_finish - time.time()))


def _took(job: JobRecord) -> str | None:
    if job.finished_at is None:
        return None
    return as_duration(max(1, job.finished_at - job.created_at))


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
