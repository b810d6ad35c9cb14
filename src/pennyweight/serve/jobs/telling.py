"""A run's own log as a job's events, metrics and bill.

`events.jsonl` is the truth: it is cut back to the checkpoint when a run resumes, so that each line
stands for work that counts. Every line becomes one event with a mark of its own, which the store
keeps once, and what a line used is billed with its event or not at all.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pennyweight.config import public
from pennyweight.report import read_events
from pennyweight.serve.records import EventRecord, JobRecord, Usage
from pennyweight.serve.refusals import one_line

__all__ = ["Log", "event", "last_step", "usage_of"]

HOUR_S = 3600
_BLOCK = 1 << 20


def event(
    job_id: str,
    mark: str,
    message: str,
    *,
    level: str = "info",
    kind: str = "message",
    data: Mapping[str, Any] | None = None,
) -> EventRecord:
    """Something a job says; texts are made fit for anybody's eyes."""
    return EventRecord(
        id=f"ftevent-{secrets.token_hex(12)}",
        job_id=job_id,
        mark=mark,
        created_at=int(time.time()),
        level=level,
        kind=kind,
        message=str(public(one_line(message))),
        data=data or {},
    )


@dataclass
class Log:
    """The log of one run as it grows.

    `total_steps` is known once a step was. `measured_s`: seconds of the device by mark, as the
    engine saw them; where it did not, the run's own figure counts.
    """

    job_id: str
    path: Path
    epochs: float | None
    max_steps: int | None
    held_out_tokens: int = 0
    step: int = 0
    total_steps: int = 0
    train_loss: dict[int, float] = field(default_factory=dict)
    valid_loss: dict[int, float] = field(default_factory=dict)
    measured_s: dict[str, float] = field(default_factory=dict)
    _offset: int = 0

    def read(self) -> list[EventRecord]:
        """Events for what was logged since the last call."""
        found = [self._event(line) for line in self._lines()]
        return [each for each in found if each is not None]

    def metrics(self, step: int) -> dict[str, Any]:
        """What is known of the adapter after this step."""
        known: dict[str, Any] = {"step": float(step)}
        if step in self.train_loss:
            known["train_loss"] = self.train_loss[step]
        if step in self.valid_loss:
            known["valid_loss"] = known["full_valid_loss"] = self.valid_loss[step]
        return known

    def table(self) -> str:
        """All steps as CSV."""
        lines = ["step,train_loss,valid_loss"]
        for step in sorted(self.train_loss.keys() | self.valid_loss.keys()):
            if step:
                pair = (self.train_loss.get(step, ""), self.valid_loss.get(step, ""))
                lines.append(f"{step},{pair[0]},{pair[1]}")
        return "\n".join(lines) + "\n"

    def _lines(self) -> Iterator[dict[str, Any]]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    self._offset += len(line)
                    yield json.loads(line)
        except FileNotFoundError:
            return

    def _event(self, line: Mapping[str, Any]) -> EventRecord | None:
        kind = line["kind"]
        if kind == "step":
            return self._step(line)
        if kind == "evaluation":
            return self._evaluation(line)
        if kind == "notice":
            digest = hashlib.sha256(str(line["text"]).encode()).hexdigest()[:16]
            return event(self.job_id, f"notice {digest}", str(line["text"]), level="warn")
        return None

    def _step(self, line: Mapping[str, Any]) -> EventRecord:
        number, loss = int(line["number"]), _finite(line["loss"])
        self.step = max(self.step, number)
        if loss is not None:
            self.train_loss[number] = loss
        if self.max_steps is not None:
            self.total_steps = self.max_steps
        elif self.epochs and line["epoch"]:
            self.total_steps = max(number, round(number * self.epochs / float(line["epoch"])))
        mark = f"step {number}"
        data = {
            "step": number,
            "total_steps": self.total_steps,
            "train_loss": loss,
            "learning_rate": line["learning_rate"],
            "epoch": line["epoch"],
            "tokens": line["tokens"],
            "trained_tokens": line["trained_tokens"],
            "device_seconds": round(self.measured_s.pop(mark, float(line["seconds"])), 6),
        }
        said = f"Step {number}/{self.total_steps}: training loss={_shown(loss)}"
        return event(self.job_id, mark, said, kind="metrics", data=data)

    def _evaluation(self, line: Mapping[str, Any]) -> EventRecord:
        number, loss = int(line["number"]), _finite(line["loss"])
        if loss is not None:
            self.valid_loss[number] = loss
        mark = f"evaluation {number}"
        data = {
            "step": number,
            "valid_loss": loss,
            "tokens": self.held_out_tokens,
            "device_seconds": round(self.measured_s.pop(mark, 0.0), 6),
        }
        where = "before the first step" if number == 0 else f"after step {number}"
        said = f"Evaluation {where}: validation loss={_shown(loss)}"
        return event(self.job_id, mark, said, kind="metrics", data=data)


def usage_of(job: JobRecord, told: EventRecord) -> Usage | None:
    """What the work used that this event tells of; None where it tells of none."""
    if told.kind != "metrics":
        return None
    trained = told.mark.startswith("step ")
    tokens = int(told.data["tokens"])
    return Usage(
        hour=told.created_at // HOUR_S * HOUR_S,
        owner=job.owner,
        model=job.model,
        job_id=job.id,
        tokens_trained=tokens if trained else 0,
        tokens_evaluated=0 if trained else tokens,
        device_seconds=float(told.data["device_seconds"]),
    )


def last_step(path: Path) -> int:
    """The step that a run's log ends with; a resumed run's is that of its checkpoint."""
    steps = [line["number"] for line in read_events(path) if line["kind"] == "step"]
    return int(steps[-1]) if steps else 0


def _finite(value: Any) -> float | None:
    """Numbers that are not finite stand in the log as texts."""
    return float(value) if isinstance(value, int | float) else None


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
