"""The guard: no answer without a key, and bodies within their bounds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pennyweight.serve.guard import MOST_BODIES, Guard, depth_of, strict_json
from pennyweight.serve.keys import COOKIE, Caller, Keys
from pennyweight.serve.refusals import Refused
from pennyweight.serve.settings import RequestLimits

LIMITS = RequestLimits(body_bytes=1024, file_bytes=4096, body_seconds=0.05)
DOOR = (b"<form>", [(b"content-security-policy", b"default-src 'none'")])


class Asked:
    """What a guarded app answers to one request: it echoes the size of the body and the caller."""

    def __init__(
        self, keys: Keys, path: str = "/v1/x", method: str = "GET", **headers: str
    ) -> None:
        self.keys, self.path, self.method = keys, path, method
        self.headers = [(n.replace("_", "-").encode(), v.encode()) for n, v in headers.items()]
        self.status, self.head, self.body = 0, dict[bytes, bytes](), b""
        self.caller: Caller | None = None

    def sends(self, *parts: bytes, then_waits: bool = False) -> Asked:
        asyncio.run(self._run(list(parts), then_waits))
        return self

    async def _run(self, parts: list[bytes], then_waits: bool) -> None:
        async def receive() -> MutableMapping[str, Any]:
            if not parts:
                await asyncio.sleep(5 if then_waits else 0)
                return {"type": "http.disconnect"}
            part = parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(parts) or then_waits}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.status, self.head = message["status"], dict(message["headers"])
            else:
                self.body += message["body"]

        async def app(scope: Any, receive: Any, send: Any) -> None:
            self.caller, size, more = scope["state"]["caller"], 0, True
            while more:
                message = await receive()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": str(size).encode()})

        guard = Guard(app, keys=self.keys, limits=LIMITS, page_refusal=lambda: DOOR)
        scope = {"type": "http", "method": self.method, "path": self.path, "headers": self.headers}
        await guard(scope, receive, send)


def test_only_a_key_opens_and_every_answer_has_an_id(keys: Keys) -> None:
    right = Asked(keys, authorization="Bearer bob-key-0123456789ab").sends(b"")
    assert (right.status, right.caller) == (200, Caller("bob"))
    assert right.head[b"x-request-id"].startswith(b"req_")
    for header in (
        "",
        "Bearer",
        "Bearer wrong",
        "Basic bob-key-0123456789ab",
        "bob-key-0123456789ab",
    ):
        refused = Asked(keys, authorization=header).sends(b"")
        assert refused.status == 401
        assert json.loads(refused.body)["error"]["code"] == "invalid_api_key"
        assert refused.head[b"x-request-id"] != right.head[b"x-request-id"]
    assert Asked(keys, path="/healthz").sends(b"").status == 200
    assert Asked(keys, path="/healthz/").sends(b"").status == 401


def test_a_browser_is_shown_where_to_put_its_key(keys: Keys) -> None:
    shown = Asked(keys, path="/", accept="text/html,*/*").sends(b"")
    assert (shown.status, shown.body) == (401, DOOR[0])
    assert shown.head[b"content-security-policy"] == b"default-src 'none'"


def test_a_session_acts_from_our_own_pages_only(keys: Keys) -> None:
    cookie = f"{COOKIE}={keys.session(Caller('bob'))}"
    assert Asked(keys, cookie=cookie).sends(b"").caller == Caller("bob", by_cookie=True)
    own = {"cookie": cookie, "host": "127.0.0.1:8000"}
    from_here = Asked(keys, method="POST", origin="http://127.0.0.1:8000", **own).sends(b"")
    assert from_here.status == 200
    assert Asked(keys, method="POST", sec_fetch_site="same-origin", **own).sends(b"").status == 200
    for elsewhere in ({"origin": "http://evil.example"}, {"origin": "null"}, {}):
        assert Asked(keys, method="POST", **own, **elsewhere).sends(b"").status == 403
    assert Asked(keys, cookie=f"{COOKIE}=bob.99999999999.00").sends(b"").status == 401
    assert Asked(keys, cookie="\x00=;;,").sends(b"").status == 401


def test_a_body_is_refused_as_soon_as_it_is_too_large(keys: Keys) -> None:
    bob = {"authorization": "Bearer bob-key-0123456789ab"}
    assert Asked(keys, "/v1/x", "POST", **bob).sends(b"x" * 1000, b"y" * 24).body == b"1024"
    assert Asked(keys, "/v1/x", "POST", **bob).sends(b"x" * 1000, b"y" * 25).status == 413
    # What says so itself is not read at all.
    said = Asked(keys, "/v1/x", "POST", content_length="1025", **bob).sends(b"")
    assert said.status == 413
    form = {"content_type": "multipart/form-data; boundary=x", "content_length": "4096", **bob}
    assert Asked(keys, "/v1/files", "POST", **form).sends(b"").status == 200


def test_a_body_that_stops_coming_is_refused(keys: Keys) -> None:
    asked = Asked(keys, authorization="Bearer bob-key-0123456789ab").sends(b"x", then_waits=True)
    assert asked.status == 408


def test_bodies_held_at_once_are_bounded_and_room_comes_back(keys: Keys) -> None:
    async def story() -> list[int]:
        release = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            await release.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        guard = Guard(app, keys=keys, limits=LIMITS)

        async def ask() -> tuple[int, dict[bytes, bytes]]:
            answers: list[MutableMapping[str, Any]] = []

            async def receive() -> MutableMapping[str, Any]:
                return {"type": "http.request", "body": b"x" * LIMITS.body_bytes}

            async def send(message: MutableMapping[str, Any]) -> None:
                answers.append(message)

            head = [(b"authorization", b"Bearer bob-key-0123456789ab")]
            scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": head}
            await guard(scope, receive, send)
            return answers[0]["status"], dict(answers[0]["headers"])

        held = [asyncio.create_task(ask()) for _ in range(MOST_BODIES)]
        await asyncio.sleep(0)
        status, headers = await ask()
        assert int(headers[b"retry-after"]) >= 1
        release.set()
        answered = [*await asyncio.gather(*held), await ask()]
        return [status, *(found for found, _ in answered)]

    assert asyncio.run(story()) == [429] + [200] * (MOST_BODIES + 1)


nested = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\{}[]\né', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text('"{[\\', max_size=3), inner, max_size=3)
    ),
    max_leaves=20,
)


def depth(value: Any) -> int:
    inside = (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    )
    return 0 if inside is None else 1 + max((depth(each) for each in inside), default=0)


@given(nested, st.booleans())
def test_depth_is_counted_outside_texts(value: Any, ascii_only: bool) -> None:
    assert depth_of(json.dumps(value, ensure_ascii=ascii_only).encode()) == depth(value)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"[" * 100_000, "too_deeply_nested"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "too_deeply_nested"),
        (b'{"a": NaN}', "invalid_json"),
        (b'{"a": "\\ud800"}', "invalid_json"),
        (b'{"a": "\xff"}', "invalid_json"),
        (b"{", "invalid_json"),
        (b"9" * 5000, "invalid_json"),
        (b'"' + b"\\" * 1001, "invalid_json"),
    ],
)
def test_what_is_no_json_of_ours_is_refused(body: bytes, code: str) -> None:
    with pytest.raises(Refused) as refused:
        strict_json(body, 64)
    assert (refused.value.status, refused.value.code) == (400, code)
