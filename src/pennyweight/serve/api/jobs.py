"""`/v1/fine_tuning/jobs`: created, followed, paused and ended."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.concurrency import run_in_threadpool

from pennyweight.serve.api.body import body_of, described_by
from pennyweight.serve.api.caller import Asks
from pennyweight.serve.api.wire import (
    CheckpointObject,
    EventObject,
    JobObject,
    Page,
    checkpoint_object,
    event_object,
    job_object,
    page,
)
from pennyweight.serve.jobs import CreateJob
from pennyweight.serve.records import CheckpointRecord, EventRecord, JobRecord
from pennyweight.serve.refusals import absent, invalid
from pennyweight.serve.service import Service

__all__ = ["router"]

router = APIRouter(prefix="/fine_tuning/jobs", tags=["fine-tuning"])
Limit = Annotated[int, Query(ge=1, le=100)]
IdempotencyKey = Annotated[str | None, Header(max_length=255)]
_METADATA = re.compile(r"metadata\[(.{1,64})\]")


@router.post("", openapi_extra=described_by(CreateJob))
async def create_job(
    request: Request, caller: Asks, idempotency_key: IdempotencyKey = None
) -> JobObject:
    """Tune the base on uploaded rows. The same `Idempotency-Key` again gives the same job."""
    service: Service = request.app.state.service
    asked = await body_of(request, CreateJob, service.settings.limits.nesting)
    job = await run_in_threadpool(service.jobs.create, caller.name, asked, idempotency_key)
    return job_object(job)


@router.get("", response_model=Page[JobObject])
def list_jobs(request: Request, caller: Asks, after: str | None = None, limit: Limit = 20) -> Any:
    """The key's jobs, newest first; `metadata[name]=value` keeps those that have it."""
    service: Service = request.app.state.service
    wanted = {
        match[1]: value
        for name, value in request.query_params.items()
        if (match := _METADATA.fullmatch(name))
    }
    found: list[JobRecord] = []
    try:
        for job in _after(service, caller.name, after):
            if all(job.metadata.get(name) == value for name, value in wanted.items()):
                found.append(job)
            if len(found) > limit:
                break
    except KeyError:
        raise absent("fine-tuning job", after or "", param="after") from None
    return page([job_object(job) for job in found[:limit]], len(found) > limit)


def _after(service: Service, owner: str, after: str | None) -> Iterator[JobRecord]:
    more = True
    while more:
        jobs, more = service.store.listed(JobRecord, {"owner": owner}, after=after, limit=100)
        yield from jobs
        after = jobs[-1].id if jobs else None


@router.get("/{job_id}")
def get_job(request: Request, caller: Asks, job_id: str) -> JobObject:
    service: Service = request.app.state.service
    return job_object(service.jobs.get(caller.name, job_id))


@router.post("/{job_id}/cancel")
def cancel_job(request: Request, caller: Asks, job_id: str) -> JobObject:
    """End it within a step; the steps it made are paid."""
    service: Service = request.app.state.service
    return job_object(service.jobs.cancel(caller.name, job_id))


@router.post("/{job_id}/pause")
def pause_job(request: Request, caller: Asks, job_id: str) -> JobObject:
    """Save it, and let it wait for `resume`."""
    service: Service = request.app.state.service
    return job_object(service.jobs.pause(caller.name, job_id))


@router.post("/{job_id}/resume")
def resume_job(request: Request, caller: Asks, job_id: str) -> JobObject:
    """Go on where it was paused, to the bit."""
    service: Service = request.app.state.service
    return job_object(service.jobs.resume(caller.name, job_id))


@router.get("/{job_id}/events", response_model=Page[EventObject])
def list_events(
    request: Request, caller: Asks, job_id: str, after: str | None = None, limit: Limit = 20
) -> Any:
    """What the job said, newest first."""
    service: Service = request.app.state.service
    service.jobs.get(caller.name, job_id)
    found, more = _listed(service, EventRecord, job_id, after, limit)
    return page([event_object(each) for each in found], more)


@router.get("/{job_id}/checkpoints", response_model=Page[CheckpointObject])
def list_checkpoints(
    request: Request, caller: Asks, job_id: str, after: str | None = None, limit: Limit = 10
) -> Any:
    """Adapters that were kept on the way, newest first; each can be asked by its name."""
    service: Service = request.app.state.service
    service.jobs.get(caller.name, job_id)
    found, more = _listed(service, CheckpointRecord, job_id, after, limit)
    return page([checkpoint_object(each) for each in found], more)


def _listed(
    service: Service, kind: type[Any], job_id: str, after: str | None, limit: int
) -> tuple[list[Any], bool]:
    try:
        return service.store.listed(kind, {"job_id": job_id}, after=after, limit=limit)
    except KeyError:
        raise invalid(
            f"after: nothing of this job is called {after!r:.80}", param="after"
        ) from None
