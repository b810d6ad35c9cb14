"""A true `pennyweight serve` in a process of its own, for stories and campaigns.

Campaigns fork it from a process that has imported everything once, as they do with runs.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from campaigns.clock import until

__all__ = ["KEY", "Server", "warm_server"]

KEY, KEY_VARIABLE = "campaign-key-0123456789", "PENNYWEIGHT_API_KEY"
_SERVING = re.compile(r"^serving \S+ at http://127\.0\.0\.1:(\d+)$", re.M)
STARTS_WITHIN_S = 120.0


class _Process(Protocol):
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def send_signal(self, number: int) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


class _Forked:
    """A child of this process, handled as `subprocess.Popen` is."""

    def __init__(self, command: list[str], said: Path, key: str) -> None:
        from campaigns.children import Child

        self._child = Child(command, said, before=lambda: os.environ.update({KEY_VARIABLE: key}))

    def poll(self) -> int | None:
        if self._child.code is None:
            found, status = os.waitpid(self._child.pid, os.WNOHANG)
            if found:
                self._child.code = os.waitstatus_to_exitcode(status)
        return self._child.code

    def kill(self) -> None:
        self._child.send(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        self._child.send(number)

    def hears(self) -> bool:
        return self.poll() is not None or self._child.listens()

    def wait(self, timeout: float | None = None) -> int:
        return self._child.wait(timeout or 60)


def warm_server() -> None:
    """Import what a server needs, once for all that are forked."""
    from campaigns.children import warm

    warm()
    import pennyweight.serve.api
    import pennyweight.serve.listening  # noqa: F401


class Server:
    """`with Server(data_dir, base) as server:` serves until it leaves; `kill` and `start` in between.

    `settings` are of a server's YAML. What it says goes to `data_dir.said`. `forked`: from this
    process, which `warm_server` has made ready.
    """

    def __init__(
        self,
        data_dir: Path,
        base: str = "builtin",
        *,
        key: str = KEY,
        forked: bool = False,
        **settings: Any,
    ) -> None:
        self.data_dir, self.key, self.forked = data_dir, key, forked
        self.said_in = data_dir.with_suffix(".said")
        self.config = data_dir.with_suffix(".yaml")
        tree = {
            "base": {"model": base, "device": "cpu"},
            "model_name": "base",
            "data_dir": str(data_dir),
            "port": 0,
            # Whoever asks may stand still for a while, with all of this machine.
            "limits": {"head_seconds": 600, "body_seconds": 600},
            **settings,
        }
        self.config.write_text(json.dumps(tree))  # JSON is YAML
        self.port = 0
        self._process: _Process | None = None

    def start(self) -> Server:
        """Start it and wait until it serves; one that does not leaves no process behind."""
        self.spawn()
        try:
            if not until(self.serves, STARTS_WITHIN_S, every_s=0.01):
                raise RuntimeError(f"the server did not start: {self.said()[-2000:]}")
        except BaseException:
            self.kill()
            raise
        return self

    def spawn(self) -> None:
        """Start it without waiting."""
        self.said_in.write_bytes(b"")
        command = ["serve", "--config", str(self.config)]
        if self.forked:
            self._process = _Forked(command, self.said_in, self.key)
        else:
            with self.said_in.open("ab") as said:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "pennyweight", *command],
                    stdout=said,
                    stderr=said,
                    env={**os.environ, KEY_VARIABLE: self.key},
                )

    def serves(self) -> bool:
        """Whether it has said where. RuntimeError: it has ended."""
        assert self._process is not None
        if found := _SERVING.search(self.said()):
            self.port = int(found[1])
            return True
        if (code := self._process.poll()) is not None:
            raise RuntimeError(f"the server ended with {code}: {self.said()[-2000:]}")
        return False

    def hears(self) -> bool:
        """Whether a forked one hears SIGTERM by now; earlier it is Python's start that is ended."""
        assert isinstance(self._process, _Forked)
        return self._process.hears()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def said(self) -> str:
        return self.said_in.read_text(encoding="utf-8", errors="replace")

    def kill(self) -> None:
        """SIGKILL, at this instant; one that has ended stays so."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def stop(self, timeout_s: float = 60) -> int:
        """SIGTERM, and its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout_s)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, _: TracebackType | None
    ) -> None:
        self.kill()

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 600,
    ) -> tuple[int, Any]:
        """Status and answer, as JSON where it is. OSError and HTTPException where it is not there."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        given = {"authorization": f"Bearer {self.key}", **(headers or {})}
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        try:
            connection.request(method, f"/v1{path}", sent, given)
            answer = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(content)
        except ValueError:
            return answer.status, content

    def upload(self, content: bytes, name: str = "rows.jsonl") -> str:
        """The id of a file of rows."""
        mark = "a-boundary-of-nothing"
        parts = (
            f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        ).encode()
        body = parts + content + f"\r\n--{mark}--\r\n".encode()
        head = {"content-type": f"multipart/form-data; boundary={mark}"}
        status, answer = self.ask("POST", "/files", body, headers=head)
        assert status == 200, answer
        return str(answer["id"])
