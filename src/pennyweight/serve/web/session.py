"""Signing in: a key becomes a sealed cookie that no script reads and no other site sends."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from pennyweight.serve.guard import PageRefusal
from pennyweight.serve.keys import COOKIE, SESSION_SECONDS
from pennyweight.serve.service import Service
from pennyweight.serve.web.looks import HEADERS, html, text_of

__all__ = ["door", "router"]

router = APIRouter()
WRONG = "That is not a key of this server. It begins with pw- where the server made it itself."


def door() -> PageRefusal:
    """What a browser without a key is shown, whatever it asked for."""
    headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    return text_of("door.html", wrong=None, next="").encode(), headers


@router.get("/login")
async def ask(request: Request) -> Response:
    return html("door.html", wrong=None, next="")


@router.post("/login")
async def enter(request: Request) -> Response:
    """The cookie for a key. A form of another site is refused: it could sign somebody in as another."""
    service: Service = request.app.state.service
    if not _from_here(request):
        return html("door.html", status=403, wrong="Sign in from this page itself.", next="")
    async with request.form(max_files=0, max_fields=4) as form:
        key, wanted = form.get("key"), form.get("next")
    caller = service.keys.caller(key.strip()) if isinstance(key, str) else None
    if caller is None:
        return html("door.html", status=401, wrong=WRONG, next="")
    answer = RedirectResponse(_local(wanted), 303, HEADERS)
    answer.set_cookie(
        COOKIE,
        service.keys.session(caller),
        max_age=SESSION_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )
    return answer


@router.post("/logout")
async def leave() -> Response:
    answer = RedirectResponse("/", 303, HEADERS)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


def _from_here(request: Request) -> bool:
    origin = request.headers.get("origin")
    if origin is None:
        return request.headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")
    return origin.partition("://")[2] == request.headers.get("host", "")


def _local(wanted: Any) -> str:
    """A path of ours to go on to, and never another site."""
    if isinstance(wanted, str) and wanted.startswith("/") and not wanted.startswith(("//", "/\\")):
        return wanted
    return "/"
