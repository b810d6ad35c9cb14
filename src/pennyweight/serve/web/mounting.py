"""The pages put before a service: their routes, what of them needs no key, and the door."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, Response

from pennyweight.serve.refusals import absent
from pennyweight.serve.service import Service
from pennyweight.serve.web import adapters, jobs, new_job, session, usage
from pennyweight.serve.web.looks import HEADERS, STATIC

__all__ = ["mount"]

static = APIRouter()
_FILES = {
    path.relative_to(STATIC).as_posix(): path
    for path in sorted(STATIC.rglob("*"))
    if path.suffix in {".css", ".js", ".svg", ".woff2"}
}
_KEPT = {**HEADERS, "cache-control": "public, max-age=31536000, immutable"}


def mount(service: Service) -> None:
    """Let the service have the pages."""
    parts = (session, static, new_job, jobs, adapters, usage)
    service.pages += [getattr(part, "router", part) for part in parts]
    service.open_paths |= {"/login", *(f"/static/{name}" for name in _FILES)}
    service.page_refusal = session.door


@static.get("/static/{name:path}")
async def asset(request: Request, name: str) -> Response:
    """A file that ships with the page; no other path leads anywhere."""
    if name not in _FILES:
        raise absent("file", name)
    return FileResponse(_FILES[name], headers=_KEPT)
