"""The listening socket: HTTP/1.1 by uvicorn, with what it leaves open closed.

A head that is too large is 431 and one that does not come is 408; more connections than are allowed
are closed at once, and one whose client stops reading is closed in time. SIGTERM and Ctrl-C drain: what is under way is finished or saved, and nothing new begins.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pennyweight.errors import ConfigError
from pennyweight.serve.refusals import Refused
from pennyweight.serve.settings import RequestLimits

__all__ = ["Listening", "bound", "listening"]

KEEP_ALIVE_S = 75
BACKLOG = 256


def bound(host: str, port: int) -> socket.socket:
    """A socket at this address; ConfigError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.socket(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
        server.listen(BACKLOG)  # whoever comes before the server is ready waits
    except OSError as fault:
        server.close()
        raise ConfigError(
            f"{host}:{port}: cannot listen there ({fault.strerror or fault}); name another --port"
        ) from None
    server.set_inheritable(False)
    return server


def listening(
    app: Any,
    limits: RequestLimits,
    *,
    drain_seconds: float,
    on_stop: Callable[[], object],
    on_ready: Callable[[], object] = lambda: None,
) -> Listening:
    """A server of this ASGI app; `on_ready` is called once it answers and hears SIGTERM and Ctrl-C,
    `on_stop` when it is asked to end.
    """

    class Guarded(_Guarded):
        bounds = limits

    config = uvicorn.Config(
        app,
        http=Guarded,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        h11_max_incomplete_event_size=limits.header_bytes,
        backlog=BACKLOG,
    )
    return Listening(config, on_stop, on_ready)


class Listening(uvicorn.Server):
    """uvicorn's server, which says when it is ready and when it is asked to end."""

    def __init__(
        self,
        config: uvicorn.Config,
        on_stop: Callable[[], object],
        on_ready: Callable[[], object],
    ) -> None:
        super().__init__(config)
        self._on_stop, self._on_ready = on_stop, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As uvicorn's, but that the signal is not raised again: to end when asked is no failure."""
        self._on_stop()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


class _Guarded(H11Protocol):
    """One connection: its head in time and within bounds."""

    bounds: RequestLimits
    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.bounds.connections:
            transport.abort()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        self._is_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # Between two requests uvicorn's own timer runs; from the next head's first byte on, ours.
        if self._head is None and self.conn.their_state is h11.IDLE:
            self._await_head()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._head_is_here()

    def pause_writing(self) -> None:
        """More is ready than the client takes in: see to it that it goes on."""
        super().pause_writing()
        self._await_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._is_read()
        super().resume_writing()

    def on_response_complete(self) -> None:
        self._head_is_here()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What h11 could not read: too large a head, or no HTTP at all."""
        self._head_is_here()
        if self._head_is_too_large():
            most = self.bounds.header_bytes
            self._refuse(
                Refused(431, f"the head is larger than {most:,} bytes", code="headers_too_large")
            )
        else:
            self._refuse(Refused(400, "this is not a valid HTTP request", code="invalid_http"))

    def _head_is_too_large(self) -> bool:
        return len(self.conn.trailing_data[0]) > self.bounds.header_bytes

    def _await_head(self) -> None:
        self._head = self.loop.call_later(self.bounds.head_seconds, self._too_slow)

    def _head_is_here(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _await_reader(self, unsent: int) -> None:
        seconds = self.bounds.body_seconds
        self._unread = self.loop.call_later(seconds, self._does_not_read, unsent)

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _does_not_read(self, unsent: int) -> None:
        """Nobody took in anything: what is under way for this client would be held for ever."""
        left = self.transport.get_write_buffer_size()
        if left < unsent:
            self._await_reader(left)
        else:
            self.transport.abort()

    def _too_slow(self) -> None:
        self._head = None
        seconds = self.bounds.head_seconds
        self._refuse(
            Refused(408, f"no whole head came within {seconds:g} s", code="request_timeout")
        )

    def _refuse(self, refused: Refused) -> None:
        body = json.dumps(refused.body()).encode()
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            head = h11.Response(status_code=refused.status, headers=headers)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                sent = self.conn.send(event)
                if sent:
                    self.transport.write(sent)
        self.transport.close()
