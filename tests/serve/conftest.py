"""A server in this process: the tiny Llama, two keys, a client for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pennyweight.config import BaseConfig
from pennyweight.model import BaseModel, load_base
from pennyweight.serve.keys import Keys
from pennyweight.serve.settings import ServeSettings
from pennyweight.serve.store import Database, SqliteDatabase, Store
from pennyweight.serve.store.schema import TABLES

KEYS = {"alice": "alice-key-0123456789", "bob": "bob-key-0123456789ab"}


@pytest.fixture(scope="session")
def small_base(tiny_llama_folder: Path) -> BaseModel:
    return load_base(BaseConfig(model=str(tiny_llama_folder), quantization="nf4", device="cpu"))


@pytest.fixture
def keys() -> Keys:
    return Keys(KEYS, admins=("alice",))


def postgres() -> Database:
    """The database of $PENNYWEIGHT_TEST_POSTGRES, emptied."""
    address = os.environ.get("PENNYWEIGHT_TEST_POSTGRES")
    if address is None:
        pytest.skip("no Postgres to try: name a database in PENNYWEIGHT_TEST_POSTGRES")
    pytest.importorskip("psycopg", reason="the extra postgres is not installed")
    from pennyweight.serve.store.postgres import PostgresDatabase

    database = PostgresDatabase(address)
    with database.transaction() as tx:
        for table in ("facts", "idempotency", *TABLES.values()):
            tx.run(f"DROP TABLE IF EXISTS {table}")
    return database


@pytest.fixture(params=["sqlite", "postgres"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    sqlite = request.param == "sqlite"
    made = Store(SqliteDatabase(tmp_path / "server.sqlite") if sqlite else postgres())
    yield made
    made.close()


@pytest.fixture
def started(
    small_base: BaseModel, tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """`started(**settings)`: a service under way, ended with the test."""
    pytest.importorskip("fastapi")
    from pennyweight.serve.service import Service

    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    # Measuring this machine takes seconds; its speed is not known here.
    monkeypatch.setattr("pennyweight.serve.pace.calibrated", lambda device, config: device)
    running: list[Service] = []

    def start(**settings: Any) -> Service:
        tree = {
            "base": {"model": str(small_base.folder), "device": "cpu"},
            "model_name": "tiny",
            "data_dir": str(tmp_path / "data"),
            **settings,
        }
        made = ServeSettings.model_validate(tree)
        made.data_path.mkdir(parents=True, exist_ok=True)
        store = Store(SqliteDatabase(made.data_path / "server.sqlite"))
        service = Service(made, keys, store, small_base)
        service.start()
        running.append(service)
        return service

    yield start
    for service in running:
        service.end(20)


@pytest.fixture
def client_of(started: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """`client_of(service, "alice")`: a client with that key; None for one without."""
    pytest.importorskip("httpx")
    from starlette.testclient import TestClient

    from pennyweight.serve.api import create_app

    opened, apps = [], dict[int, Any]()

    def client(service: Any, who: str | None = "alice") -> TestClient:
        head = {} if who is None else {"authorization": f"Bearer {KEYS[who]}"}
        app = apps.setdefault(id(service), None) or create_app(service)
        apps[id(service)] = app
        made = TestClient(app, headers=head, raise_server_exceptions=False)
        opened.append(made)
        return made

    yield client
    for each in opened:
        each.close()
