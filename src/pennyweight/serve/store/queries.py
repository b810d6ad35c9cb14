"""Everything the server asks of its database, each question one method.

A method that changes something returns only once the change is durable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pennyweight.errors import ConfigError
from pennyweight.serve.records import (
    ENDED,
    EVERYONE,
    CheckpointRecord,
    EventRecord,
    JobRecord,
    ModelRecord,
    Usage,
)
from pennyweight.serve.store.database import Database, Transaction
from pennyweight.serve.store.schema import TABLES, USAGE_KEY, USED, created, from_row, to_row

__all__ = ["Store"]

FORMAT = "1"
Record = TypeVar("Record")


class Store:
    """Records by kind; see records.py."""

    def __init__(self, database: Database) -> None:
        self._database = database
        with database.transaction() as tx:
            for statement in created():
                tx.run(statement)
            tx.run(
                "INSERT INTO facts (name, value) VALUES ('format', ?) ON CONFLICT DO NOTHING",
                (FORMAT,),
            )
            found = tx.rows("SELECT value FROM facts WHERE name = 'format'")[0]["value"]
        if found != FORMAT:
            raise ConfigError(
                f"the store was written in format {found}, this version reads {FORMAT}: "
                "use the version that wrote it, or another data_dir"
            )

    def close(self) -> None:
        self._database.close()

    # Any record -----------------------------------------------------------------------------

    def add(self, record: Any) -> Any:
        """Keep a new record; gives it with its `seq`."""
        with self._database.transaction() as tx:
            return _add(tx, record)

    def get(self, kind: type[Record], named: str, owner: str | None = None) -> Record | None:
        """The record of this id, if it is the owner's or everyone's; `owner` None sees all."""
        with self._database.transaction() as tx:
            return _get(tx, kind, named, owner)

    def listed(
        self,
        kind: type[Record],
        where: Mapping[str, Any],
        *,
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
    ) -> tuple[list[Record], bool]:
        """A page of records with these values, behind the one named `after`; and whether more follow.

        A value that is a tuple stands for any of its members. KeyError: there is no `after`.
        """
        table = TABLES[kind]
        conditions, values = _conditions(where)
        with self._database.transaction() as tx:
            if after is not None:
                found = tx.rows(
                    f"SELECT seq FROM {table} WHERE {conditions} AND id = ?", [*values, after]
                )
                if not found:
                    raise KeyError(after)
                conditions += f" AND seq {'<' if newest_first else '>'} ?"
                values.append(found[0]["seq"])
            rows = tx.rows(
                f"SELECT * FROM {table} WHERE {conditions} "
                f"ORDER BY seq {'DESC' if newest_first else 'ASC'} LIMIT ?",
                [*values, limit + 1],
            )
        return [from_row(kind, row) for row in rows[:limit]], len(rows) > limit

    def all(self, kind: type[Record], where: Mapping[str, Any]) -> list[Record]:
        """Every record with these values, oldest first."""
        return self.listed(kind, where, limit=2**31 - 1, newest_first=False)[0]

    def count(self, kind: type[Any], where: Mapping[str, Any]) -> int:
        conditions, values = _conditions(where)
        with self._database.transaction() as tx:
            return int(
                tx.rows(f"SELECT COUNT(*) AS n FROM {TABLES[kind]} WHERE {conditions}", values)[0][
                    "n"
                ]
            )

    # Jobs -----------------------------------------------------------------------------------

    def create_job(
        self,
        job: JobRecord,
        first: EventRecord,
        *,
        idempotency: tuple[str, str] | None = None,
        most_live: int | None = None,
    ) -> tuple[JobRecord, bool]:
        """The job of this request, and whether it is new.

        `idempotency`: the caller's name for the request and a digest of it; the same name again gives
        the first job. ValueError: that name was used for another request. OverflowError: the owner
        has `most_live` jobs that have not ended.
        """
        with self._database.transaction() as tx:
            if idempotency is not None:
                name, request = idempotency
                found = tx.rows(
                    "SELECT request, answer FROM idempotency WHERE owner = ? AND name = ?",
                    (job.owner, name),
                )
                if found:
                    if found[0]["request"] != request:
                        raise ValueError("Idempotency-Key")
                    known = _get(tx, JobRecord, found[0]["answer"], job.owner)
                    assert known is not None, "jobs are never deleted"
                    return known, False
            if most_live is not None:
                ended = ", ".join("?" for _ in ENDED)
                n = tx.rows(
                    f"SELECT COUNT(*) AS n FROM jobs WHERE owner = ? AND status NOT IN ({ended})",
                    (job.owner, *sorted(ENDED)),
                )[0]["n"]
                if n >= most_live:
                    raise OverflowError(n)
            kept = _add(tx, job)
            _add(tx, first)
            if idempotency is not None:
                tx.run(
                    "INSERT INTO idempotency (owner, name, request, answer) VALUES (?, ?, ?, ?)",
                    (job.owner, *idempotency, job.id),
                )
            return kept, True

    def change_job(
        self,
        job_id: str,
        *,
        when: Iterable[str],
        event: EventRecord | None = None,
        **values: Any,
    ) -> JobRecord | None:
        """Set these fields if the job's status is one of `when`; the job as it is then, else None."""
        with self._database.transaction() as tx:
            return _change_job(tx, job_id, when, event, values)

    def record_progress(
        self,
        job_id: str,
        events: Sequence[EventRecord],
        usage: Callable[[EventRecord], Usage | None],
    ) -> list[EventRecord]:
        """Keep those events that are new, and bill what each of them used, together.

        An event is known by its mark, so what a resumed run does again is billed once.
        """
        if not events:
            return []
        with self._database.transaction() as tx:
            new = [event for event in events if _add(tx, event, once=True) is not None]
            tokens = 0
            for event in new:
                if (used := usage(event)) is not None:
                    _bill(tx, used)
                    tokens += used.tokens_trained + used.tokens_evaluated
            if tokens:
                tx.run(
                    "UPDATE jobs SET trained_tokens = trained_tokens + ? WHERE id = ?",
                    (tokens, job_id),
                )
            return new

    def finish_job(
        self, job_id: str, event: EventRecord, models: Sequence[ModelRecord], **values: Any
    ) -> JobRecord | None:
        """End a job with its models served, in one stroke; None where it has ended already."""
        with self._database.transaction() as tx:
            when = ("validating_files", "queued", "running", "paused")
            job = _change_job(tx, job_id, when, event, values)
            if job is not None:
                for model in models:
                    _add(tx, model, once=True)
            return job

    def add_checkpoint(self, checkpoint: CheckpointRecord, model: ModelRecord) -> bool:
        """Keep a checkpoint and its name, once."""
        with self._database.transaction() as tx:
            if _add(tx, checkpoint, once=True) is None:
                return False
            _add(tx, model, once=True)
            return True

    # Files and models -----------------------------------------------------------------------

    def delete_file(self, file_id: str, owner: str) -> bool:
        with self._database.transaction() as tx:
            statement = "UPDATE files SET deleted = 1 WHERE id = ? AND owner = ? AND deleted = 0"
            return tx.run(statement, (file_id, owner)) == 1

    def forget_file(self, file_id: str) -> None:
        """After its bytes are gone."""
        with self._database.transaction() as tx:
            tx.run("DELETE FROM files WHERE id = ?", (file_id,))

    def files_in_use(self) -> set[str]:
        """Files that a job which has not ended reads."""
        ended = ", ".join("?" for _ in ENDED)
        with self._database.transaction() as tx:
            rows = tx.rows(
                f"SELECT training_file, validation_file FROM jobs WHERE status NOT IN ({ended})",
                sorted(ENDED),
            )
        return {value for row in rows for value in row.values() if value}

    def name_model(self, model: ModelRecord) -> bool:
        """Let a new name stand for a version; False where the name is taken."""
        with self._database.transaction() as tx:
            return _add(tx, model, once=True) is not None

    def delete_model(self, named: str, owner: str) -> bool:
        """Forget a name of the owner's; False where there is none."""
        with self._database.transaction() as tx:
            return tx.run("DELETE FROM models WHERE id = ? AND owner = ?", (named, owner)) == 1

    def versions_in_use(self) -> set[str]:
        with self._database.transaction() as tx:
            return {row["version"] for row in tx.rows("SELECT DISTINCT version FROM models")}

    # Usage ----------------------------------------------------------------------------------

    def bill(self, used: Iterable[Usage]) -> None:
        """Add to what was used."""
        with self._database.transaction() as tx:
            for each in used:
                _bill(tx, each)

    def usage(self, where: Mapping[str, Any], *, since: int, until: int) -> list[Usage]:
        """What was used in the hours from `since` on, before `until`."""
        conditions, values = _conditions(where)
        with self._database.transaction() as tx:
            rows = tx.rows(
                f"SELECT * FROM usage_hours WHERE {conditions} AND hour >= ? AND hour < ? "
                "ORDER BY hour, owner, model, job_id",
                [*values, since, until],
            )
        return [from_row(Usage, row) for row in rows]


def _conditions(where: Mapping[str, Any]) -> tuple[str, list[Any]]:
    parts, values = ["1 = 1"], list[Any]()
    for name, value in where.items():
        assert name.isidentifier(), "column names come from this code alone"
        if isinstance(value, tuple):
            parts.append(f"{name} IN ({', '.join('?' for _ in value) or 'NULL'})")
            values += value
        else:
            parts.append(f"{name} = ?")
            values.append(value)
    return " AND ".join(parts), values


def _add(tx: Transaction, record: Any, *, once: bool = False) -> Any:
    """The record with its `seq`; None where `once` finds it there already."""
    table = TABLES[type(record)]
    row = to_row(record)
    # Transactions come one after the other, so the next number is nobody else's.
    row["seq"] = 1 + (tx.rows(f"SELECT MAX(seq) AS n FROM {table}")[0]["n"] or 0)
    statement = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join('?' for _ in row)})" + (
        " ON CONFLICT DO NOTHING" if once else ""
    )
    if tx.run(statement, list(row.values())) == 0:
        return None
    return dataclasses.replace(record, seq=row["seq"])


def _get(tx: Transaction, kind: type[Record], named: str, owner: str | None) -> Record | None:
    rows = tx.rows(f"SELECT * FROM {TABLES[kind]} WHERE id = ?", (named,))
    if owner is not None:
        # Names of one's own come before those of everyone.
        rows = sorted(
            (row for row in rows if row["owner"] in (owner, EVERYONE)),
            key=lambda row: bool(row["owner"] == EVERYONE),
        )
    return from_row(kind, rows[0]) if rows else None


def _change_job(
    tx: Transaction,
    job_id: str,
    when: Iterable[str],
    event: EventRecord | None,
    values: Mapping[str, Any],
) -> JobRecord | None:
    before = _get(tx, JobRecord, job_id, None)
    if before is None or before.status not in set(when):
        return None
    after = dataclasses.replace(before, **values)
    row = to_row(after)
    changes = ", ".join(f"{name} = ?" for name in values)
    tx.run(f"UPDATE jobs SET {changes} WHERE id = ?", [*(row[name] for name in values), job_id])
    if event is not None:
        _add(tx, event, once=True)
    return after


def _bill(tx: Transaction, used: Usage) -> None:
    row = to_row(used)
    more = ", ".join(f"{name} = usage_hours.{name} + excluded.{name}" for name in USED)
    tx.run(
        f"INSERT INTO usage_hours ({', '.join(row)}) VALUES ({', '.join('?' for _ in row)}) "
        f"ON CONFLICT ({', '.join(USAGE_KEY)}) DO UPDATE SET {more}",
        list(row.values()),
    )
