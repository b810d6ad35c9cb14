"""The store in Postgres (extra `postgres`): the same statements, one connection, one server at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pennyweight.errors import ConfigError, DiskError
from pennyweight.serve.store.database import Transaction

__all__ = ["PostgresDatabase"]

# Any number, as long as it is the same in every server.
LOCK = 7_341_528_960


class _Cursor:
    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor

    def run(self, statement: str, values: Sequence[Any] = ()) -> int:
        self._cursor.execute(statement.replace("?", "%s"), tuple(values))
        return int(self._cursor.rowcount)

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        self._cursor.execute(statement.replace("?", "%s"), tuple(values))
        names = [column.name for column in self._cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in self._cursor.fetchall()]


class PostgresDatabase:
    """A database by its address. ConfigError: another server has it, or it cannot be reached.

    A connection that breaks is opened again with the next transaction; the lock with it.
    """

    def __init__(self, address: str) -> None:
        try:
            import psycopg
        except ImportError:
            raise ConfigError(
                "store: a Postgres database needs psycopg: pip install 'pennyweight[postgres]'"
            ) from None
        self._psycopg, self._address = psycopg, address
        self._lock = threading.Lock()
        self._connection: Any = None
        try:
            self._connect()
        except psycopg.Error as fault:
            # The address holds a password, and stays out of what is said.
            raise ConfigError(f"store: the database cannot be reached: {_said(fault)}") from None

    def _connect(self) -> None:
        connection: Any = self._psycopg.connect(self._address, autocommit=True)
        with connection.cursor() as cursor:
            cursor.execute("SET synchronous_commit = on")
            cursor.execute("SELECT pg_try_advisory_lock(%s)", (LOCK,))
            if not cursor.fetchone()[0]:
                connection.close()
                raise ConfigError(
                    "store: another server has this database; stop it, or name another"
                )
        self._connection = connection

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        with self._lock:
            try:
                if self._connection.closed:
                    self._connect()
                with self._connection.transaction(), self._connection.cursor() as cursor:
                    yield _Cursor(cursor)
            except self._psycopg.OperationalError as fault:
                raise DiskError(f"store: the database refused: {_said(fault)}") from fault

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def _said(fault: Exception) -> str:
    return type(fault).__name__ if "password" in str(fault) else str(fault).strip().splitlines()[0]
