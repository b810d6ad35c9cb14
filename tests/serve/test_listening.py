"""The listening socket, asked with raw bytes: heads too large, too slow, or no HTTP."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from pennyweight.errors import ConfigError
from pennyweight.serve.guard import Guard
from pennyweight.serve.keys import Keys
from pennyweight.serve.listening import bound, listening
from pennyweight.serve.settings import RequestLimits

LIMITS = RequestLimits(
    header_bytes=2048, head_seconds=0.3, body_seconds=0.3, body_bytes=4096, connections=8
)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/long":
            await _long(send)
            return
        while (await receive()).get("more_body"):
            pass
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
        )
        await send({"type": "http.response.body", "body": b"ok"})

    guard = Guard(app, keys=Keys({"a": "a" * 20}), limits=LIMITS)
    server = listening(guard, LIMITS, drain_seconds=1, on_stop=lambda: None)
    with bound("127.0.0.1", 0) as opened:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield opened.getsockname()[1]
        server.should_exit = True
        thread.join()


PIECES, PIECE = 512, b"x" * (1 << 16)
OVER = threading.Event()


async def _long(send: Any) -> None:
    """More than any buffer on the way holds."""
    OVER.clear()
    size = str(PIECES * len(PIECE)).encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", size)]}
    )
    for at in range(PIECES):
        await send({"type": "http.response.body", "body": PIECE, "more_body": at < PIECES - 1})
    OVER.set()


def answer(port: int, *parts: bytes, pause_s: float = 0.0) -> tuple[int, dict[str, Any]]:
    """Status and error of what comes back; status 0 where the connection is closed without a word."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        for part in parts:
            client.sendall(part)
            time.sleep(pause_s)
        said = b""
        while block := client.recv(65536):
            said += block
    if not said:
        return 0, {}
    head, _, body = said.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    return status, json.loads(body)["error"] if body.startswith(b"{") else {}


KEY = b"Authorization: Bearer " + b"a" * 20 + b"\r\nConnection: close\r\n"


def test_a_sound_request_is_answered(port: int) -> None:
    assert answer(port, b"GET / HTTP/1.1\r\nHost: x\r\n" + KEY + b"\r\n")[0] == 200


def test_a_head_that_is_too_large_is_431(port: int) -> None:
    status, error = answer(port, b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 4000)
    assert (status, error["code"]) == (431, "headers_too_large")


@pytest.mark.parametrize(
    "nonsense", [b"\x16\x03\x01\x02\x00", b"NONSENSE\r\n\r\n", b"GET / HTTP/1.1\r\n: x\r\n\r\n"]
)
def test_what_is_no_http_is_400(port: int, nonsense: bytes) -> None:
    assert answer(port, nonsense + b"\r\n\r\n")[0] == 400


@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost:"])
def test_a_head_that_does_not_come_is_408(port: int, begun: bytes) -> None:
    status, error = answer(port, begun)
    assert (status, error["code"]) == (408, "request_timeout")


def test_a_head_that_drips_is_408_too(port: int) -> None:
    """Every drop is in time and the whole is not."""
    with socket.create_connection(("127.0.0.1", port), timeout=0.1) as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        said = b""
        for _ in range(20):
            try:
                said = client.recv(65536)
                break
            except TimeoutError:
                client.sendall(b"X: y\r\n")
    assert said.startswith(b"HTTP/1.1 408")


def test_a_body_that_does_not_come_is_408(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n" + KEY + b"\r\n"
    status, error = answer(port, head + b"12")
    assert (status, error["code"]) == (408, "request_timeout")


def test_a_body_without_a_length_is_counted(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + KEY + b"\r\n"
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    assert answer(port, head + chunk * 5 + b"0\r\n\r\n")[0] == 413
    assert answer(port, head + chunk * 3 + b"0\r\n\r\n")[0] == 200


def test_an_answer_that_nobody_takes_in_is_cut_off(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n" + KEY + b"\r\n")
        assert OVER.wait(5)
        taken = 0
        with suppress(ConnectionResetError):
            while block := client.recv(1 << 20):
                taken += len(block)
    assert taken < PIECES * len(PIECE)


def test_a_client_that_reads_slowly_gets_all_of_it(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n" + KEY + b"\r\n")
        taken = 0
        for _ in range(8):  # three times as long as it may stand still
            time.sleep(0.12)
            taken += len(client.recv(1 << 20))
        while block := client.recv(1 << 20):
            taken += len(block)
    assert taken > PIECES * len(PIECE)


def test_more_connections_than_are_allowed_are_closed(port: int) -> None:
    idle = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(8)]
    time.sleep(0.05)
    try:
        assert answer(port, b"GET / HTTP/1.1\r\nHost: x\r\n" + KEY + b"\r\n")[0] == 0
    except ConnectionResetError:
        pass
    finally:
        for each in idle:
            each.close()


def test_a_port_that_is_taken_is_said(port: int) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        bound("127.0.0.1", port)
