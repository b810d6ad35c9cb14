"""Templates to answers: everything escaped, nothing inline, and headers that hold a browser to it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import jinja2
from starlette.responses import HTMLResponse

from pennyweight import __version__
from pennyweight.plan.table import as_duration, as_size

__all__ = ["HEADERS", "STATIC", "html", "text_of"]

STATIC = Path(__file__).parent / "static"
# Scripts, styles and fonts from here alone; nobody frames the page, nothing is sent elsewhere.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not `no-referrer`: a browser would then send `Origin: null` with our own forms.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
_LINES = {
    "Jobs": ("/", "M4 6h16M4 12h16M4 18h10"),
    "New job": ("/jobs/new", "M12 5v14M5 12h14"),
    "Adapters": ("/adapters", "M12 3l9 5-9 5-9-5zM3 13l9 5 9-5"),
    "Playground": ("/playground", "M4 5h16v11H9l-5 4z"),
    "Usage": ("/usage", "M5 20v-7M12 20V4M19 20v-11"),
}
PLACES = [{"name": n, "path": path, "icon": icon} for n, (path, icon) in _LINES.items()]


def html(
    template: str,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    **values: Any,
) -> HTMLResponse:
    """A page or a piece of one."""
    return HTMLResponse(text_of(template, **values), status, {**HEADERS, **(headers or {})})


def text_of(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(values)


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "figure": lambda value: "" if value is None else f"{value:.4g}",
        "count": lambda value: "" if value is None else f"{value:,}",
        "money": lambda value: f"{value:,.2f}",
        "size": as_size,
        "lasting": as_duration,
        "iso": lambda at: _moment(at).isoformat(),
        "when": lambda at: f"{_moment(at):%-d %b %Y, %H:%M} UTC",
        "clock": lambda at: f"{_moment(at):%H:%M:%S}",
    }
    made.globals |= {"asset": _asset, "places": PLACES, "version": __version__, "here": None}
    return made


@cache
def _asset(name: str) -> str:
    """The address of a file of `static`, which changes with its bytes: it may be kept for ever."""
    mark = sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?{mark}"


def _moment(at: int) -> datetime:
    return datetime.fromtimestamp(at, UTC)
