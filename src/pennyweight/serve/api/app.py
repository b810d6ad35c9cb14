"""The ASGI application: routes, what every route may answer, and faults in the shape of the API."""

from __future__ import annotations

import errno
import logging
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pennyweight import __version__
from pennyweight.errors import DiskError, PennyweightError
from pennyweight.serve.api import chat, files, jobs, models, usage
from pennyweight.serve.api.wire import ErrorBody, Health
from pennyweight.serve.guard import App, Guard
from pennyweight.serve.refusals import Refused, one_line
from pennyweight.serve.service import Service

__all__ = ["create_app", "routes_of"]

log = logging.getLogger("pennyweight.serve")
# What any route may answer beside its own.
_EVERYWHERE = (400, 401, 403, 404, 405, 408, 413, 429, 500, 503, 507)
_NAMES = {404: "not_found", 405: "method_not_allowed"}


def create_app(service: Service) -> App:
    """The whole application, guarded. `service` is all it talks to."""
    return Guard(
        routes_of(service),
        keys=service.keys,
        limits=service.settings.limits,
        open_paths=service.open_paths,
        page_refusal=service.page_refusal,
    )


def routes_of(service: Service) -> FastAPI:
    """The routes without their guard; `app.state.service` is what they ask."""
    answers: dict[int | str, dict[str, Any]] = {code: {"model": ErrorBody} for code in _EVERYWHERE}
    app = FastAPI(
        title="Pennyweight",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/v1/openapi.json",
        responses=answers,
    )
    app.state.service = service

    @app.get("/healthz", tags=["server"])
    async def health() -> Health:
        """Whether the server answers; the only route without a key."""
        if not service.engine.alive:
            said = "nothing works with the model any more: start the server again"
            raise Refused(503, said, kind="server_error", code="engine_ended")
        return Health(status="draining" if service.draining else "ok")

    v1 = APIRouter(prefix="/v1")
    for part in (files, jobs, models, chat, usage):
        v1.include_router(part.router)
    app.include_router(v1)
    for router in service.pages:
        app.include_router(router, include_in_schema=False)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(PennyweightError, _ours)
    app.add_exception_handler(OSError, _system)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _internal)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document; FastAPI's own 422 is never sent, a refused value is 400."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        for path, operations in found["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                for status, answer in operation["responses"].items():
                    # Of a route that answers in text FastAPI says that its refusals are text too.
                    if status != "200" and "text/plain" in answer.get("content", {}):
                        answer["content"] = {"application/json": answer["content"]["text/plain"]}
                if path == "/healthz":
                    operation["security"] = []
                body = (
                    operation.get("requestBody", {}).get("content", {}).get("application/json", {})
                )
                schemas.update(body.get("schema", {}).pop("$defs", {}))
        app.openapi_schema = found
    return app.openapi_schema


async def _refused(request: Request, fault: Exception) -> JSONResponse:
    assert isinstance(fault, Refused)
    headers = {} if fault.retry_after_s is None else {"retry-after": str(fault.retry_after_s)}
    if fault.status in (408, 413):
        headers["connection"] = "close"
    if fault.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(fault.body(), fault.status, headers)


async def _ours(request: Request, fault: Exception) -> JSONResponse:
    if isinstance(fault, DiskError):
        return await _no_room(request, fault)
    if isinstance(fault, ValueError):  # ConfigError, DataError, AdapterError: of what was asked
        return await _refused(request, Refused(400, one_line(str(fault)), code="invalid_value"))
    return await _internal(request, fault)


async def _system(request: Request, fault: Exception) -> JSONResponse:
    """A form's file goes through the system's temporary folder, which may be full too."""
    if isinstance(fault, OSError) and fault.errno in (errno.ENOSPC, errno.EDQUOT):
        return await _no_room(request, fault)
    return await _internal(request, fault)


async def _no_room(request: Request, fault: Exception) -> JSONResponse:
    log.error("%s %s: %s", request.method, request.url.path, one_line(str(fault)))
    said = "the server's disk refused; nothing was kept, try again once there is room"
    return await _refused(
        request, Refused(507, said, kind="server_error", code="disk", retry_after_s=30)
    )


async def _not_valid(request: Request, fault: Exception) -> JSONResponse:
    assert isinstance(fault, RequestValidationError)
    first = fault.errors()[0]
    where = [str(part) for part in first["loc"]][1:] or ["body"]
    said = f"{'.'.join(where)}: {first['msg']}"
    return await _refused(
        request, Refused(400, said[:500], param=".".join(where)[:120], code="invalid_value")
    )


async def _http(request: Request, fault: Exception) -> JSONResponse:
    assert isinstance(fault, HTTPException)
    said = f"{request.method} {request.url.path[:200]}: {fault.detail}"
    refused = Refused(
        fault.status_code, said, code=_NAMES.get(fault.status_code, "invalid_request")
    )
    answer = await _refused(request, refused)
    for name, value in (fault.headers or {}).items():
        answer.headers[name] = value
    return answer


async def _internal(request: Request, fault: Exception) -> JSONResponse:
    log.error("%s %s", request.method, request.url.path, exc_info=fault)
    said = f"something went wrong inside; request {getattr(request.state, 'request_id', '')}"
    return await _refused(request, Refused(500, said, kind="server_error", code="internal_error"))
