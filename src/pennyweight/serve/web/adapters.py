"""Adapters with their numbers before and after, and the playground that asks several at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from pennyweight.registry import held_out_in
from pennyweight.serve.api.caller import Asks
from pennyweight.serve.catalogue import Served
from pennyweight.serve.records import EVERYONE, CheckpointRecord, EventRecord, ModelRecord
from pennyweight.serve.service import Service
from pennyweight.serve.web.looks import HEADERS
from pennyweight.serve.web.routing import Page, show
from pennyweight.serve.web.views import Figures, figures_of

__all__ = ["router"]

router = APIRouter(route_class=Page)
QUESTION = "Give the signature of this function as JSON.\n\ndef get_file(self, key):\n    return open(self.folder / key)"
LONGEST_SHOWN = 256
CHECKPOINT = "checkpoint"


@router.get("/adapters")
def adapters(request: Request, caller: Asks) -> Response:
    rows = _rows(request.app.state.service, caller.name)
    points = [row for row in rows if row["kind"] == CHECKPOINT]
    whole = [row for row in rows if row["kind"] != CHECKPOINT]
    return show(request, "adapters.html", here="Adapters", adapters=whole, checkpoints=points)


@router.post("/adapters/forget")
def forget(
    request: Request, caller: Asks, model: Annotated[str, Form(alias="id", max_length=300)]
) -> Response:
    service: Service = request.app.state.service
    service.catalogue.delete(caller.name, model)
    return RedirectResponse("/adapters", 303, HEADERS)


@router.get("/playground")
def playground(
    request: Request, caller: Asks, model: Annotated[list[str] | None, Query()] = None
) -> Response:
    """The base and every adapter to choose from; checkpoints only where one was asked for."""
    service: Service = request.app.state.service
    rows = _rows(service, caller.name)
    asked = set(model or ())
    whole = [row["id"] for row in rows if row["kind"] != CHECKPOINT or row["id"] in asked]
    base = service.settings.base_id
    marked = {base, *(asked or whole[:1])}
    models = [
        {"id": each, "base": each == base, "chosen": each in marked} for each in (base, *whole)
    ]
    most = service.settings.chat.max_new_tokens
    return show(
        request,
        "playground.html",
        here="Playground",
        models=models,
        question=QUESTION if base == "builtin" else "",
        tokens=min(LONGEST_SHOWN, most),
        most_tokens=most,
    )


def _rows(service: Service, owner: str) -> list[dict[str, Any]]:
    """What is served to the key beside the base, the newest first."""
    store, known = service.store, dict[str, tuple[Figures, dict[str, int]]]()
    where = {"owner": (owner, EVERYONE)}
    jobs = {(named.id, named.owner): named.job_id for named in store.all(ModelRecord, where)}
    found = []
    for model in reversed(service.catalogue.listed(owner)[1:]):
        job = jobs.get((model.id, model.owner))
        if job is not None and job not in known:
            metrics = store.all(EventRecord, {"job_id": job, "kind": "metrics"})
            points = store.all(CheckpointRecord, {"job_id": job})
            known[job] = figures_of(metrics), {point.model: point.step for point in points}
        told = _trained(model.id, *known[job]) if job else _brought(service, model)
        shared = {"id": model.id, "created_at": model.created_at, "mine": model.owner == owner}
        found.append({**shared, "job": job, **told})
    return found


def _trained(model: str, figures: Figures, points: Mapping[str, int]) -> dict[str, Any]:
    """An adapter of a job: its last word, or what it was at a step, where it is a checkpoint."""
    step = points.get(model)
    if step is None:
        return {"kind": "trained here", "before": figures.before, "after": figures.after}
    after = dict(figures.held_out).get(step)
    return {"kind": CHECKPOINT, "before": figures.before, "after": after}


def _brought(service: Service, model: Served) -> dict[str, Any]:
    """An adapter of a folder; its figures where it came with its receipt."""
    told: dict[str, Any] = {}
    if model.version is not None:
        told = held_out_in(service.versions.path(model.version)) or {}
    losses = (told.get("loss_before"), told.get("loss_after"))
    before, after = (float(loss) if isinstance(loss, int | float) else None for loss in losses)
    return {"kind": "from a folder", "before": before, "after": after}
