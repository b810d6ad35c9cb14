"""The little that the store asks of a database, and SQLite's answer (WAL, synchronous FULL).

Statements are the part of SQL that SQLite and Postgres share, with `?` for values.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pennyweight.errors import DiskError

__all__ = ["Database", "SqliteDatabase", "Transaction"]


@runtime_checkable
class Transaction(Protocol):
    """Statements that are kept together, or not at all."""

    def run(self, statement: str, values: Sequence[Any] = ()) -> int:
        """Change something; the count of rows that were."""
        ...

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Read something; each row by the names of its columns."""
        ...


@runtime_checkable
class Database(Protocol):
    """Transactions, one after the other; whoever leaves one normally knows it to be durable."""

    def transaction(self) -> AbstractContextManager[Transaction]: ...

    def close(self) -> None: ...


class _Sqlite:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def run(self, statement: str, values: Sequence[Any] = ()) -> int:
        return self._connection.execute(statement, values).rowcount

    def rows(self, statement: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        found = self._connection.execute(statement, values)
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found]


class SqliteDatabase:
    """One file. DiskError where it cannot be written or is not a database."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(
                path, timeout=30, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
        except sqlite3.Error as fault:
            raise DiskError(f"{path}: {fault}; mend its rights, or name another data_dir") from None

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                yield _Sqlite(self._connection)
                self._connection.execute("COMMIT")
            except sqlite3.OperationalError as fault:
                self._undo()
                raise DiskError(f"{self.path}: {fault}; free some space, or mend it") from fault
            except BaseException:
                self._undo()
                raise

    def _undo(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def close(self) -> None:
        with self._lock:
            self._connection.close()
