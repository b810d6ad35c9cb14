"""A new job: rows and settings in, a look at both, and only then the start."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any, BinaryIO

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from pennyweight.builtin import task
from pennyweight.serve.api.caller import Asks
from pennyweight.serve.jobs import CreateJob
from pennyweight.serve.records import FileRecord
from pennyweight.serve.refusals import invalid
from pennyweight.serve.service import Service
from pennyweight.serve.web.looking import Look, look
from pennyweight.serve.web.looks import HEADERS, html
from pennyweight.serve.web.routing import Page, show

__all__ = ["router"]

router = APIRouter(route_class=Page)
EXAMPLE_NAME, EXAMPLE_ROWS = "example.jsonl", 600
FILES_SHOWN = 8
HELD_OUT = 0.1  # of the rows, where the form asks for a measure before and after
_HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier")
_LABELS = {
    "n_epochs": "Passes over the rows",
    "batch_size": "Rows in a step",
    "learning_rate_multiplier": "Learning rate multiplier",
    "r": "Rank",
    "max_steps": "At most so many steps",
    "seed": "Seed",
    "suffix": "Name",
}


@router.get("/jobs/new")
def new(request: Request, caller: Asks) -> Response:
    request.app.state.service.pace.measure()  # while the form is filled in
    return _page(request, caller.name, picked=None, checked=None, given={"hold_out": "yes"})


@router.get("/example.jsonl")
def example(request: Request, caller: Asks) -> Response:
    """The rows that come along, as a file to look at and to write one's own after."""
    kept = {**HEADERS, "content-disposition": f'attachment; filename="{EXAMPLE_NAME}"'}
    return Response(_example_rows(), media_type="application/jsonl", headers=kept)


@router.post("/jobs/check")
async def check(request: Request, caller: Asks) -> Response:
    """How the model reads the rows, what is trained of them, and whether memory is enough."""
    service: Service = request.app.state.service
    async with request.form(max_files=1, max_fields=24) as form:
        file = await run_in_threadpool(_rows_of, service, caller.name, form)
        asked, given = _asked(service, form, file), _texts(form)
    found = await run_in_threadpool(look, service, caller.name, asked)
    if request.headers.get("hx-request"):
        return html("checked.html", **_checked(found, file))
    return await run_in_threadpool(
        _page, request, caller.name, picked=file, checked=found, given=given
    )


@router.post("/jobs")
async def start(request: Request, caller: Asks) -> Response:
    """Start what was looked at; HTMX is told where to go on."""
    service: Service = request.app.state.service
    async with request.form(max_files=1, max_fields=24) as form:
        named = form.get("file_id")
        file = service.uploads.get(caller.name, named if isinstance(named, str) else "")
        asked = _asked(service, form, file)
    job = await run_in_threadpool(service.jobs.create, caller.name, asked)
    place = f"/jobs/{job.id}"
    if request.headers.get("hx-request"):
        return Response(status_code=204, headers={**HEADERS, "hx-redirect": place})
    return RedirectResponse(place, 303, HEADERS)


def _page(
    request: Request,
    owner: str,
    *,
    picked: FileRecord | None,
    checked: Look | None,
    given: Mapping[str, str],
) -> Response:
    """The form, with what was picked and given before where a look was asked for without a script."""
    service: Service = request.app.state.service
    defaults = service.settings.jobs
    where = {"owner": owner, "deleted": 0, "purpose": "fine-tune"}
    files, _ = service.store.listed(FileRecord, where, limit=FILES_SHOWN)
    told = {
        "epochs": defaults.epochs,
        "r": defaults.adapter.r,
        "max_rank": defaults.max_rank,
        "learning_rate": f"{defaults.learning_rate:g}",
    }
    if picked is not None and picked.id not in {file.id for file in files}:
        files.append(picked)
    more = {} if checked is None or picked is None else _checked(checked, picked)
    return show(
        request,
        "new.html",
        here="New job",
        files=files,
        chosen="" if picked is None else picked.id,
        defaults=told,
        given=dict.fromkeys((*_LABELS, "hold_out"), "") | dict(given),
        checked=bool(more),
        **more,
    )


def _checked(found: Look, file: FileRecord) -> dict[str, Any]:
    return {
        "faults": found.faults,
        "plan": found.plan,
        "lines": found.lines,
        "shown": found.shown,
        "ready": found.ready,
        "file_id": file.id,
    }


def _rows_of(service: Service, owner: str, form: FormData) -> FileRecord:
    """The file that was picked: a new upload, the example rows, or one that is here."""
    upload, named = form.get("file"), form.get("rows")
    if not named and isinstance(upload, UploadFile) and upload.filename:
        return _kept_once(service, owner, upload.filename, upload.file)
    if named == "example":
        return _kept_once(service, owner, EXAMPLE_NAME, io.BytesIO(_example_rows()))
    if not isinstance(named, str) or not named:
        raise invalid("Choose a file of rows first, or the example rows.", param="file")
    return service.uploads.get(owner, named)


def _kept_once(service: Service, owner: str, name: str, content: BinaryIO) -> FileRecord:
    """The upload; the same rows looked at again are the file that is here already."""
    made = service.uploads.create(owner, name, "fine-tune", content)
    where = {"owner": owner, "sha256": made.sha256, "purpose": made.purpose, "deleted": 0}
    first = service.store.all(FileRecord, where)[0]
    if first.id != made.id:
        service.uploads.delete(owner, made.id)
    return first


def _example_rows() -> bytes:
    rows = (row for row, _ in zip(task.rows("train"), range(EXAMPLE_ROWS), strict=False))
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def _held_out() -> dict[str, Any]:
    """The same rows in the look as in the job, and in each job on a file: its adapters compare."""
    return {"eval_fraction": HELD_OUT, "split_seed": 0}


def _asked(service: Service, form: FormData, file: FileRecord) -> CreateJob:
    """The form as the API's own request; what is empty is left to the server. Refused (400)."""
    given = _texts(form)
    hyper = {key: given[key] for key in _HYPERPARAMETERS if given.get(key)}
    asked: dict[str, Any] = {
        "model": service.settings.base_id,
        "training_file": file.id,
        "hyperparameters": {key: _number(key, text) for key, text in hyper.items()},
        "suffix": given.get("suffix") or None,
        "seed": _number("seed", given["seed"]) if given.get("seed") else None,
        "data": _held_out() if given.get("hold_out") else {"eval_fraction": 0.0},
    }
    for group, key in (("lora", "r"), ("train", "max_steps")):
        if given.get(key):
            asked[group] = {key: _number(key, given[key])}
    try:
        return CreateJob.model_validate(asked)
    except ValidationError as error:
        # One line a field; of a field that may also be `auto`, what was meant as a number comes last.
        told = {_label(fault["loc"]): fault["msg"] for fault in error.errors(include_url=False)}
        raise invalid("\n".join(f"{label}: {said}" for label, said in told.items())) from None


def _label(where: tuple[int | str, ...]) -> str:
    """What the form calls the field of a fault."""
    return next((_LABELS[str(part)] for part in where if str(part) in _LABELS), str(where[0]))


def _texts(form: FormData) -> dict[str, str]:
    return {key: value.strip() for key, value in form.items() if isinstance(value, str)}


def _number(name: str, text: str) -> int | float:
    """A number of a form's field; whole where it is written so."""
    try:
        return int(text) if text.isascii() and text.isdecimal() else float(text)
    except ValueError:
        said = f"{_LABELS.get(name, name)}: found {text[:20]!r}, expected a number"
        raise invalid(said, param=name) from None
