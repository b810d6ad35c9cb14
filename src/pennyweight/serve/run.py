"""`pennyweight serve`: everything opened in its order, and closed again when asked to end."""

from __future__ import annotations

import ipaddress
import os
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from pennyweight.errors import ConfigError
from pennyweight.files import make_folder
from pennyweight.serve.keys import KEY_VARIABLE, Keys, find_keys
from pennyweight.serve.settings import ServeSettings

__all__ = ["serve"]

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "multipart": "python-multipart"}


def serve(
    settings: ServeSettings,
    say: Callable[[str], object] | None = None,
    ready: Callable[[dict[str, Any]], object] | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; what was under way then is finished or saved.

    `ready` is given address, base, key and data folder once it listens; without it they are said.

    ConfigError: another server writes to the same data folder, the address is not to be had, or the
    extra `serve` is not installed.
    """
    absent = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if absent:
        raise ConfigError(f"a server needs {', '.join(absent)}: pip install 'pennyweight[serve]'")
    say = say or _to_stderr
    data = settings.data_path
    make_folder(data)
    os.environ.setdefault("PENNYWEIGHT_CACHE", str(data / "cache"))
    keys, shown = find_keys(settings.keys, data)
    _refuse_open(settings, keys)
    _serve(settings, keys, shown, say, ready)


def _serve(
    settings: ServeSettings,
    keys: Keys,
    shown: str,
    say: Callable[[str], object],
    ready: Callable[[dict[str, Any]], object] | None,
) -> None:
    from pennyweight.model import load_base
    from pennyweight.serve.api import create_app
    from pennyweight.serve.listening import bound, listening
    from pennyweight.serve.service import Service
    from pennyweight.serve.web import mount
    from pennyweight.train import RunLock

    with RunLock(settings.data_path, "server"), bound(settings.host, settings.port) as socket:
        port = socket.getsockname()[1]
        base = load_base(settings.base)
        if settings.chat.dense_weights:
            say(f"holding {base.keep_dense():,} bytes of dequantized weights")
        service = Service(settings, keys, _store(settings), base)

        def tell() -> None:
            address = _address(settings.host, port)
            if ready is None:
                for line in _welcome(settings, keys, shown, address):
                    say(line)
            else:
                about = {"address": address, "base": settings.base_id, "key": shown}
                ready({**about, "data_dir": str(settings.data_path)})

        try:
            service.start()
            mount(service)
            for note in (service.memory.in_words(), *service.notes):
                say(note)
            server = listening(
                create_app(service),
                settings.limits,
                drain_seconds=settings.drain_seconds,
                on_stop=service.drain,
                on_ready=tell,
            )
            server.run(sockets=[socket])
        finally:
            began = time.monotonic()
            whole = service.end(settings.drain_seconds)
        say(f"ended after {time.monotonic() - began:.1f} s" + ("" if whole else ", cut off"))


def _store(settings: ServeSettings) -> Any:
    from pennyweight.serve.store import SqliteDatabase, Store

    if settings.store is not None:
        from pennyweight.serve.store.postgres import PostgresDatabase

        return Store(PostgresDatabase(settings.store))
    return Store(SqliteDatabase(settings.data_path / "server.sqlite"))


def _refuse_open(settings: ServeSettings, keys: Keys) -> None:
    """An address that others reach is not opened with a key that nobody chose."""
    try:
        loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        loopback = settings.host == "localhost"
    if not loopback and keys.made_in is not None:
        raise ConfigError(
            f"host {settings.host}: others can reach it, so its keys have to be chosen: "
            f"set {KEY_VARIABLE}, or name a file of keys (`keys:` or --keys)"
        )


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _welcome(settings: ServeSettings, keys: Keys, shown: str, address: str) -> list[str]:
    made = [] if keys.made_in is None else [f"key: {shown} (kept in {keys.made_in})"]
    python = f'os.environ["{shown[1:]}"]' if shown.startswith("$") else f'"{shown}"'
    body = (
        f'{{"model": "{settings.base_id}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    )
    return [
        *made,
        f"curl {address}/v1/chat/completions -H \"Authorization: Bearer {shown}\" -d '{body}'",
        f'import os; from openai import OpenAI; client = OpenAI(base_url="{address}/v1", '
        f"api_key={python})",
        f"page: open {address} in a browser, and paste the key there",
        f"serving {settings.base_id} at {address}",
    ]


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
