"""What the store keeps, as frozen values: files, jobs, events, checkpoints, models, usage.

`owner` is the name of the key that made a thing, and the only one that sees it; `EVERYONE` stands
for all keys. Times are whole seconds since 1970. `seq` grows with every record of a kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

__all__ = [
    "ENDED",
    "EVERYONE",
    "LIVE",
    "STATES",
    "CheckpointRecord",
    "EventRecord",
    "FileRecord",
    "JobRecord",
    "ModelRecord",
    "State",
    "Usage",
]

EVERYONE = ""
State = Literal[
    "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
]
STATES: tuple[State, ...] = get_args(State)
ENDED: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})
# What the server works on by itself, also after it was killed.
LIVE: frozenset[str] = frozenset({"validating_files", "queued", "running"})


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Rows that were uploaded, or a job's results; `path` lies under the data folder."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created_at: int
    path: str
    status: str = "processed"
    deleted: int = 0
    seq: int = 0


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A fine-tuning job. `asked`: the request as it came; `hyperparameters`: what it was settled to."""

    id: str
    owner: str
    created_at: int
    status: str
    model: str
    training_file: str
    validation_file: str | None
    seed: int
    suffix: str | None
    priority: str
    asked: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    metadata: Mapping[str, Any]
    error: Mapping[str, Any] = field(default_factory=dict)
    result_files: Mapping[str, Any] = field(default_factory=dict)
    finished_at: int | None = None
    estimated_finish: int | None = None
    fine_tuned_model: str | None = None
    trained_tokens: int = 0
    seq: int = 0


@dataclass(frozen=True, slots=True)
class EventRecord:
    """What a job said. `mark` names what it tells within the job (`step 12`), so that it is kept once."""

    id: str
    job_id: str
    mark: str
    created_at: int
    level: str
    kind: str
    message: str
    data: Mapping[str, Any]
    seq: int = 0


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """The adapter after one step of a job, served under `model`."""

    id: str
    job_id: str
    step: int
    created_at: int
    model: str
    metrics: Mapping[str, Any]
    seq: int = 0


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A name that can be asked by its owner, and the immutable version it stands for."""

    id: str
    owner: str
    created_at: int
    version: str
    parent: str
    job_id: str | None = None
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used within one hour under one key, of one model, by one job or by questions."""

    hour: int = 0
    owner: str = ""
    model: str = ""
    job_id: str = ""
    tokens_trained: int = 0
    tokens_evaluated: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    requests: int = 0
    device_seconds: float = 0.0
