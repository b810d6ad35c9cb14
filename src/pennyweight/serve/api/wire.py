"""The objects of the API as OpenAI's clients read them, and records turned into them."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel

from pennyweight.serve.catalogue import Served
from pennyweight.serve.records import CheckpointRecord, EventRecord, FileRecord, JobRecord

__all__ = [
    "CheckpointObject",
    "Deleted",
    "ErrorBody",
    "EventObject",
    "FileObject",
    "Health",
    "JobObject",
    "ModelObject",
    "Page",
    "UsageRow",
    "checkpoint_object",
    "event_object",
    "file_object",
    "job_object",
    "model_object",
    "page",
]


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorFields


class Health(BaseModel):
    status: Literal["ok", "draining"]


class FileObject(BaseModel):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    status_details: str | None = None


class ModelObject(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None


class Deleted(BaseModel):
    id: str
    object: str
    deleted: bool


class JobError(BaseModel):
    code: str
    message: str
    param: str | None


class JobObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    status: str
    hyperparameters: dict[str, Any]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    error: JobError | None
    seed: int
    estimated_finish: int | None
    integrations: list[Any]
    metadata: dict[str, str]
    method: dict[str, Any]
    user_provided_suffix: str | None


class EventObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointObject(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, Any]


class UsageRow(BaseModel):
    """What was used, and what it costs; None stands for all, where rows are taken together."""

    start_time: int | None
    key: str | None
    model: str | None
    job: str | None
    tokens_trained: int
    tokens_evaluated: int
    tokens_in: int
    tokens_out: int
    requests: int
    device_seconds: float
    cost: float


Item = TypeVar("Item", bound=BaseModel)


class Page(BaseModel, Generic[Item]):
    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool = False
    first_id: str | None = None
    last_id: str | None = None


def page(items: list[Any], more: bool = False) -> dict[str, Any]:
    """A page of objects that have ids."""
    return {
        "object": "list",
        "data": items,
        "has_more": more,
        "first_id": items[0].id if items else None,
        "last_id": items[-1].id if items else None,
    }


def file_object(file: FileRecord) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=file.created_at,
        filename=file.filename,
        purpose=file.purpose,
        status=file.status,
    )


def model_object(model: Served) -> ModelObject:
    return ModelObject(
        id=model.id,
        created=model.created_at,
        owned_by=model.owner or "pennyweight",
        root=model.id if model.parent is None else model.parent,
        parent=model.parent,
    )


def job_object(job: JobRecord) -> JobObject:
    settled = dict(job.hyperparameters)
    error = JobError(**job.error) if job.error else None
    method = {"type": "supervised", "supervised": {"hyperparameters": settled}}
    return JobObject(
        id=job.id,
        created_at=job.created_at,
        finished_at=job.finished_at,
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=job.owner,
        status=job.status,
        hyperparameters=settled,
        training_file=job.training_file,
        validation_file=job.validation_file,
        result_files=list(job.result_files.get("ids", [])),
        trained_tokens=job.trained_tokens or None,
        error=error,
        seed=job.seed,
        estimated_finish=job.estimated_finish,
        integrations=[],
        metadata={str(k): str(v) for k, v in job.metadata.items()},
        method=method,
        user_provided_suffix=job.suffix,
    )


def event_object(event: EventRecord) -> EventObject:
    return EventObject.model_validate(
        {
            "id": event.id,
            "created_at": event.created_at,
            "level": event.level,
            "message": event.message,
            "type": event.kind,
            "data": dict(event.data),
        }
    )


def checkpoint_object(checkpoint: CheckpointRecord) -> CheckpointObject:
    return CheckpointObject(
        id=checkpoint.id,
        created_at=checkpoint.created_at,
        fine_tuned_model_checkpoint=checkpoint.model,
        fine_tuning_job_id=checkpoint.job_id,
        step_number=checkpoint.step,
        metrics=dict(checkpoint.metrics),
    )
