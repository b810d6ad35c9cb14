"""Routes that answer in HTML, their refusals too."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from pennyweight.errors import DiskError, PennyweightError
from pennyweight.serve.refusals import Refused
from pennyweight.serve.web.looks import html

__all__ = ["Page", "show"]

_TITLES = {
    400: "That does not go together",
    403: "Not yours to do",
    404: "Nothing here",
    409: "Not now",
    429: "Too much at once",
    507: "The disk is full",
}


class Page(APIRoute):
    """A route whose refusals are pages, or pieces of one where HTMX asked."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            try:
                return await inner(request)
            except Refused as fault:
                status, lines = fault.status, str(fault).splitlines()
            except DiskError:
                status, lines = 507, ["The server's disk refused; nothing was kept."]
            except (PennyweightError, ValueError) as fault:
                if not isinstance(fault, ValueError) or not isinstance(fault, PennyweightError):
                    raise
                status, lines = 400, str(fault).splitlines()
            title = _TITLES.get(status, "That did not work")
            if request.headers.get("hx-request"):
                return html("said.html", status=status, title=title, lines=lines)
            return show(request, "fault.html", status=status, title=title, lines=lines)

        return handler


def show(request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
    """A whole page, with what every page says of the server."""
    service = request.app.state.service
    return html(template, status=status, base_id=service.settings.base_id, **values)
