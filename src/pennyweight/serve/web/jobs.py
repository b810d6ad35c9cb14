"""Jobs: the list of them, and each with its curve, what it says, and what can be done with it."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response

from pennyweight.serve.api.caller import Asks
from pennyweight.serve.records import ENDED, EventRecord, FileRecord, JobRecord
from pennyweight.serve.refusals import absent
from pennyweight.serve.service import Service
from pennyweight.serve.web.looks import HEADERS, html
from pennyweight.serve.web.routing import Page, show
from pennyweight.serve.web.views import Figures, JobView, figures_of, job_views

__all__ = ["router"]

router = APIRouter(route_class=Page)
MOST_JOBS, MOST_EVENTS = 100, 60


@router.get("/")
def home(request: Request, caller: Asks) -> Response:
    """All jobs, or how to begin."""
    jobs = _views(request.app.state.service, caller.name)
    origin = f"{request.url.scheme}://{request.url.netloc}"
    live = any(job.live for job in jobs)
    return show(request, "jobs.html", here="Jobs", jobs=jobs, live=live, origin=origin)


@router.get("/jobs/list")
def listed(request: Request, caller: Asks) -> Response:
    jobs = _views(request.app.state.service, caller.name)
    return html("job_list.html", jobs=jobs, live=any(job.live for job in jobs))


@router.get("/jobs/{job_id}")
def one(request: Request, caller: Asks, job_id: str) -> Response:
    service: Service = request.app.state.service
    job, _ = _view(service, caller.name, job_id)
    return show(request, "job.html", here="Jobs", job=job, events=_log(service, job_id))


@router.get("/jobs/{job_id}/status")
def status(request: Request, caller: Asks, job_id: str) -> Response:
    job, _ = _view(request.app.state.service, caller.name, job_id)
    return html("job_status.html", job=job)


@router.get("/jobs/{job_id}/asked")
def asked(request: Request, caller: Asks, job_id: str) -> Response:
    """Its settings, which are settled once its files were looked over."""
    job, _ = _view(request.app.state.service, caller.name, job_id)
    return html("job_asked.html", job=job)


@router.get("/jobs/{job_id}/log")
def log(request: Request, caller: Asks, job_id: str) -> Response:
    service: Service = request.app.state.service
    job, _ = _view(service, caller.name, job_id)
    return html("job_log.html", job=job, events=_log(service, job_id))


@router.get("/jobs/{job_id}/figures")
def figures(request: Request, caller: Asks, job_id: str) -> Response:
    _, found = _view(request.app.state.service, caller.name, job_id)
    return html("job_figures.html", figures=found.table())


@router.get("/jobs/{job_id}/curve")
def curve(request: Request, caller: Asks, job_id: str) -> Response:
    """The figures as columns, for the script that draws them."""
    service: Service = request.app.state.service
    job, found = _view(service, caller.name, job_id)
    rows = found.table()
    columns = [list(column) for column in zip(*rows, strict=True)] or [[], [], []]
    ended = job.status in ENDED or job.status == "paused"
    answer = {"data": columns, "says": found.sentence(), "ended": ended}
    return JSONResponse(answer, headers=HEADERS)


@router.post("/jobs/{job_id}/{verb}")
def act(
    request: Request, caller: Asks, job_id: str, verb: Literal["cancel", "pause", "resume"]
) -> Response:
    service: Service = request.app.state.service
    getattr(service.jobs, verb)(caller.name, job_id)
    return RedirectResponse(f"/jobs/{job_id}", 303, HEADERS)


def _views(service: Service, owner: str) -> list[JobView]:
    jobs, _ = service.store.listed(JobRecord, {"owner": owner}, limit=MOST_JOBS)
    files = service.store.all(FileRecord, {"owner": owner})
    return job_views(service.store, jobs, {file.id: file.filename for file in files})


def _view(service: Service, owner: str, job_id: str) -> tuple[JobView, Figures]:
    job = service.store.get(JobRecord, job_id, owner)
    if job is None:
        raise absent("job", job_id)
    found = figures_of(service.store.all(EventRecord, {"job_id": job_id, "kind": "metrics"}))
    file = service.store.get(FileRecord, job.training_file, owner)
    return JobView.of(job, found, file.filename if file else job.training_file), found


def _log(service: Service, job_id: str) -> list[EventRecord]:
    """What it said last; steps and evaluations stand on the curve."""
    where = {"job_id": job_id, "kind": "message"}
    return service.store.listed(EventRecord, where, limit=MOST_EVENTS)[0]
