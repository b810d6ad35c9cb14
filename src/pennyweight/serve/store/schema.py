"""The tables, and records as their rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pennyweight.serve.records import (
    CheckpointRecord,
    EventRecord,
    FileRecord,
    JobRecord,
    ModelRecord,
    Usage,
)

__all__ = ["TABLES", "USAGE_KEY", "USED", "created", "from_row", "to_row"]

TABLES: dict[type[Any], str] = {
    FileRecord: "files",
    JobRecord: "jobs",
    EventRecord: "events",
    CheckpointRecord: "checkpoints",
    ModelRecord: "models",
    Usage: "usage_hours",
}
USAGE_KEY = ("hour", "owner", "model", "job_id")
USED = tuple(f.name for f in dataclasses.fields(Usage) if f.name not in USAGE_KEY)
_KEYS: dict[type[Any], tuple[str, ...]] = {Usage: USAGE_KEY, ModelRecord: ("id", "owner")}
_UNIQUE: dict[type[Any], tuple[tuple[str, ...], ...]] = {
    EventRecord: (("job_id", "mark"),),
    CheckpointRecord: (("job_id", "step"),),
}
_INDEX: dict[type[Any], tuple[tuple[str, ...], ...]] = {
    FileRecord: (("owner", "seq"),),
    JobRecord: (("owner", "seq"), ("status",)),
    EventRecord: (("job_id", "seq"),),
    ModelRecord: (("owner", "seq"),),
}

Record = TypeVar("Record")


def created() -> list[str]:
    """The statements that make what is not there yet."""
    made = [
        "CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
        "CREATE TABLE IF NOT EXISTS idempotency (owner TEXT NOT NULL, name TEXT NOT NULL, "
        "request TEXT NOT NULL, answer TEXT NOT NULL, PRIMARY KEY (owner, name))",
    ]
    for kind, table in TABLES.items():
        columns = [f"{f.name} {_sql_type(f)}" for f in dataclasses.fields(kind)]
        key = _KEYS.get(kind, ("id",))
        columns.append(f"PRIMARY KEY ({', '.join(key)})")
        columns += [f"UNIQUE ({', '.join(names)})" for names in _UNIQUE.get(kind, ())]
        made.append(f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(columns)})")
        for names in () if kind is Usage else (("seq",), *_INDEX.get(kind, ())):
            called = f"{table}_by_{'_'.join(names)}"
            made.append(f"CREATE INDEX IF NOT EXISTS {called} ON {table} ({', '.join(names)})")
    return made


def to_row(record: Any) -> dict[str, Any]:
    """A record as the values of its columns; `from_row` is the inverse."""
    row = {}
    for each in dataclasses.fields(record):
        value = getattr(record, each.name)
        row[each.name] = json.dumps(value, sort_keys=True) if isinstance(value, Mapping) else value
    return row


def from_row(kind: type[Record], row: Mapping[str, Any]) -> Record:
    values = {
        each.name: json.loads(row[each.name]) if _is_json(each) else row[each.name]
        for each in dataclasses.fields(kind)  # type: ignore[arg-type]
    }
    return kind(**values)


def _is_json(each: dataclasses.Field[Any]) -> bool:
    return str(each.type).startswith("Mapping")


def _sql_type(each: dataclasses.Field[Any]) -> str:
    named = str(each.type)
    sql = "BIGINT" if named.startswith("int") else "TEXT"
    sql = "DOUBLE PRECISION" if named.startswith("float") else sql
    return sql if "None" in named else f"{sql} NOT NULL"
