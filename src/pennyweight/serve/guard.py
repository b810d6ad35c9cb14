"""What stands before every route: who asks, how much and how deep, and the shape of a refusal.

Plain ASGI, so that nothing is read, parsed or routed before the caller is known. Every answer
carries an `x-request-id`.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any

from pennyweight.serve.keys import COOKIE, Caller, Keys
from pennyweight.serve.refusals import Refused, busy
from pennyweight.serve.settings import RequestLimits

__all__ = ["Guard", "depth_of", "strict_json"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

# Bodies that are held at the same time, as so many of the largest there may be.
MOST_BODIES = 32
PageRefusal = tuple[bytes, list[tuple[bytes, bytes]]]
"""A page and its headers."""

UNSAFE = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_TEXT_OR_BRACKET = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[{}\[\]]', re.DOTALL)


class Guard:
    """`app` behind its keys and limits.

    `open_paths` are answered without a key. `page_refusal` makes the 401 of a browser, which asks
    for HTML. The caller is in `scope["state"]["caller"]`.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Keys,
        limits: RequestLimits,
        open_paths: Collection[str] = ("/healthz",),
        page_refusal: Callable[[], PageRefusal] | None = None,
    ) -> None:
        self._app, self._keys, self._limits = app, keys, limits
        self._open = frozenset(open_paths)
        self._page_refusal = page_refusal
        self._held_bytes = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        answer = _Answer(send, f"req_{secrets.token_hex(12)}")
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            caller = self._caller(scope, headers)
            scope.setdefault("state", {})["caller"] = caller
            scope["state"]["request_id"] = answer.id
            if caller is None and scope["path"] not in self._open:
                if self._page_refusal and b"text/html" in headers.get(b"accept", b""):
                    await answer.page(401, *self._page_refusal())
                    return
                raise Refused(
                    401,
                    "no valid key: send `Authorization: Bearer KEY`",
                    kind="authentication_error",
                    code="invalid_api_key",
                )
            if "\0" in scope["path"] or b"%00" in scope.get("query_string", b""):
                raise Refused(400, "the address holds a NUL", code="invalid_value")
            body = _Body(receive, self._limits, headers, self._hold)
            try:
                await self._app(scope, body.receive, answer.send)
            finally:
                self._held_bytes -= body.held_bytes
        except Refused as refused:
            await answer.refuse(refused)

    def _hold(self, count: int) -> None:
        """Take note of bytes that stay in memory; Refused where there are too many already."""
        if self._held_bytes + count > MOST_BODIES * self._limits.body_bytes:
            raise busy("too many large requests at once: come again in a moment")
        self._held_bytes += count

    def _caller(
        self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes]
    ) -> Caller | None:
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() == "bearer":
            return self._keys.caller(key.strip())
        if b"cookie" not in headers:
            return None
        try:
            crumbs = SimpleCookie(headers[b"cookie"].decode("latin-1"))
        except CookieError:
            return None
        crumb = crumbs.get(COOKIE)
        caller = None if crumb is None else self._keys.of_session(crumb.value)
        if caller is not None and scope["method"] in UNSAFE and not _from_here(headers):
            raise Refused(
                403,
                "a page elsewhere may not act with this browser's session",
                kind="permission_error",
                code="cross_site",
            )
        return caller


def _from_here(headers: dict[bytes, bytes]) -> bool:
    """Whether a browser says that the request comes from one of our own pages."""
    origin = headers.get(b"origin")
    if origin is not None:
        return origin.partition(b"://")[2] == headers.get(b"host") != b""
    return headers.get(b"sec-fetch-site") in (b"same-origin", b"none")


class _Body:
    """The body as it comes, counted and timed: reading it may be Refused."""

    def __init__(
        self,
        receive: Receive,
        limits: RequestLimits,
        headers: dict[bytes, bytes],
        hold: Callable[[int], None],
    ) -> None:
        self._receive, self._limits, self._hold = receive, limits, hold
        self.held_bytes = 0
        form = headers.get(b"content-type", b"").lower().startswith(b"multipart/form-data")
        # The parts' own heads and the other fields of a form come on top of the file.
        self._most = limits.file_bytes + (64 << 10) if form else limits.body_bytes
        self._seen, self._whole, self._form = 0, False, form
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._most:
            raise self._too_large()

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()  # waits for the client to leave
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                message = await self._receive()
        except TimeoutError:
            raise Refused(
                408,
                f"nothing more of the body came for {self._limits.body_seconds:g} s",
                code="request_timeout",
            ) from None
        if message["type"] == "http.request":
            count = len(message.get("body", b""))
            if not self._form:  # a form's file goes to the disk
                self._hold(count)
                self.held_bytes += count
            self._seen += count
            self._whole = not message.get("more_body", False)
            if self._seen > self._most:
                raise self._too_large()
        return message

    def _too_large(self) -> Refused:
        return Refused(
            413, f"the body is larger than {self._most:,} bytes", code="request_too_large"
        )


class _Answer:
    """What goes back, with its id; a refusal is possible until something went."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.id = send, request_id
        self._begun = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            mine = (b"x-request-id", self.id.encode())
            message = {**message, "headers": [*message.get("headers", ()), mine]}
        await self._send(message)

    async def refuse(self, refused: Refused) -> None:
        headers = []
        if refused.retry_after_s is not None:
            headers.append((b"retry-after", str(refused.retry_after_s).encode()))
        if refused.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if refused.status in (408, 413):
            headers.append((b"connection", b"close"))  # the rest of the body is not wanted
        body = json.dumps(refused.body()).encode()
        await self._whole(refused.status, b"application/json", body, headers)

    async def page(self, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        await self._whole(status, b"text/html; charset=utf-8", body, headers)

    async def _whole(
        self, status: int, kind: bytes, body: bytes, headers: list[tuple[bytes, bytes]]
    ) -> None:
        if self._begun:
            return
        length = str(len(body)).encode()
        await self.send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-type", kind), (b"content-length", length), *headers],
            }
        )
        await self._send({"type": "http.response.body", "body": body})


def strict_json(body: bytes, most_nesting: int) -> Any:
    """A JSON body; Refused where it is none, too deep, or holds what cannot be told again."""

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    if depth_of(body) > most_nesting:
        raise Refused(
            400, f"the body is nested deeper than {most_nesting}", code="too_deeply_nested"
        )
    try:
        value = json.loads(body, parse_constant=no_constant)
        text = json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Refused(400, "a text holds half a surrogate pair", code="invalid_json") from None
    except (ValueError, RecursionError) as fault:
        raise Refused(400, f"the body is not JSON: {fault}"[:500], code="invalid_json") from None
    return value


def depth_of(body: bytes) -> int:
    """How deep objects and lists stand in one another, texts passed over."""
    depth = deepest = 0
    for mark in _TEXT_OR_BRACKET.finditer(body):
        first = body[mark.start()]
        if first in b"{[":
            depth += 1
            deepest = max(deepest, depth)
        elif first in b"}]":
            depth -= 1
    return deepest
