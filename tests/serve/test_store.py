"""The store: what is acknowledged is kept, once, and only its owner sees it."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pennyweight.serve.records import (
    EVERYONE,
    EventRecord,
    FileRecord,
    JobRecord,
    ModelRecord,
    Usage,
)
from pennyweight.serve.store import SqliteDatabase, Store

JOB = JobRecord(
    id="ftjob-1",
    owner="alice",
    created_at=1,
    status="validating_files",
    model="tiny",
    training_file="file-1",
    validation_file=None,
    seed=3,
    suffix=None,
    priority="normal",
    asked={"a": [1, {"b": None}]},
    hyperparameters={"n_epochs": "auto"},
    metadata={"k": "v"},
)


def event(number: int, job: str = "ftjob-1", mark: str | None = None) -> EventRecord:
    named = mark or f"step {number}"
    return EventRecord(
        f"ftevent-{job}-{number}", job, named, number, "info", "metrics", "", {"n": number}
    )


def test_a_record_comes_back_as_it_was_also_from_another_connection(tmp_path: Path) -> None:
    first = Store(SqliteDatabase(tmp_path / "s.sqlite"))
    kept, new = first.create_job(JOB, event(0))
    assert new
    second = Store(SqliteDatabase(tmp_path / "s.sqlite"))
    assert second.get(JobRecord, JOB.id) == kept == replace(JOB, seq=1)
    first.close()
    second.close()


def test_it_is_written_ahead_and_synced_in_full(tmp_path: Path) -> None:
    database = SqliteDatabase(tmp_path / "s.sqlite")
    with database.transaction() as tx:
        assert tx.rows("PRAGMA journal_mode")[0]["journal_mode"] == "wal"
        assert tx.rows("PRAGMA synchronous")[0]["synchronous"] == 2
    database.close()


def test_a_failed_transaction_leaves_nothing(store: Store) -> None:
    store.create_job(JOB, event(0))
    with pytest.raises(Exception, match=r"(?i)unique"):
        store.create_job(JOB, event(1))
    assert store.count(JobRecord, {}) == store.count(EventRecord, {}) == 1


def test_a_page_goes_on_where_the_last_one_ended(store: Store) -> None:
    for number in range(5):
        store.add(FileRecord(f"file-{number}", "alice", "f", "fine-tune", 1, "x", number, "p"))
    store.add(FileRecord("file-b", "bob", "f", "fine-tune", 1, "x", 9, "p"))
    seen, after = [], None
    for _ in range(3):
        found, more = store.listed(FileRecord, {"owner": "alice"}, after=after, limit=2)
        seen += [file.id for file in found]
        after = seen[-1]
    assert seen == [f"file-{n}" for n in (4, 3, 2, 1, 0)]
    assert not more
    with pytest.raises(KeyError):
        store.listed(FileRecord, {"owner": "alice"}, after="file-b")


def test_a_job_changes_state_only_from_where_it_may(store: Store) -> None:
    store.create_job(JOB, event(0))
    assert store.change_job(JOB.id, when=("running",), status="cancelled") is None
    changed = store.change_job(
        JOB.id, when=("validating_files",), status="queued", error={"code": "x"}
    )
    assert changed is not None
    assert (changed.status, changed.error) == ("queued", {"code": "x"})
    assert store.get(JobRecord, JOB.id) == changed


def test_fifty_at_once_with_one_idempotency_key_are_one_job(store: Store) -> None:
    answers: list[tuple[JobRecord, bool]] = []

    def create(number: int) -> None:
        job = replace(JOB, id=f"ftjob-{number}")
        answers.append(store.create_job(job, event(0, job.id), idempotency=("once", "digest")))

    threads = [threading.Thread(target=create, args=(n,)) for n in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(new for _, new in answers) == 1
    assert len({job.id for job, _ in answers}) == store.count(JobRecord, {}) == 1
    with pytest.raises(ValueError, match="Idempotency"):
        store.create_job(replace(JOB, id="other"), event(0, "other"), idempotency=("once", "else"))
    # Another key's request of that name is another request.
    _, new = store.create_job(
        replace(JOB, id="bobs", owner="bob"), event(0, "bobs"), idempotency=("once", "digest")
    )
    assert new


def test_no_more_jobs_than_may_live(store: Store) -> None:
    store.create_job(JOB, event(0), most_live=1)
    with pytest.raises(OverflowError):
        store.create_job(replace(JOB, id="second"), event(0, "second"), most_live=1)
    store.change_job(JOB.id, when=("validating_files",), status="failed")
    store.create_job(replace(JOB, id="second"), event(0, "second"), most_live=1)


def test_what_a_resumed_run_does_again_is_told_and_billed_once(store: Store) -> None:
    store.create_job(JOB, event(0, mark="created"))

    def used(each: EventRecord) -> Usage:
        return Usage(3600, "alice", "tiny", JOB.id, tokens_trained=10, device_seconds=0.5)

    store.record_progress(JOB.id, [event(1), event(2), event(3)], used)
    # Killed and resumed after step 1: steps 2 and 3 are made again, and one more.
    again = [replace(event(n), id=f"again-{n}") for n in (2, 3, 4)]
    assert [e.mark for e in store.record_progress(JOB.id, again, used)] == ["step 4"]
    (row,) = store.usage({}, since=0, until=7200)
    assert (row.tokens_trained, row.device_seconds) == (40, 2.0)
    job = store.get(JobRecord, JOB.id)
    assert job is not None
    assert job.trained_tokens == 40


def test_a_name_of_ones_own_comes_before_everyones(store: Store) -> None:
    store.name_model(ModelRecord("m", EVERYONE, 1, "v1", "tiny"))
    store.name_model(ModelRecord("m", "alice", 1, "v2", "tiny"))
    assert not store.name_model(ModelRecord("m", "alice", 2, "v3", "tiny"))

    def version(owner: str) -> str | None:
        found = store.get(ModelRecord, "m", owner)
        return found and found.version

    assert (version("alice"), version("bob")) == ("v2", "v1")
    assert store.delete_model("m", EVERYONE)
    assert (version("alice"), version("bob")) == ("v2", None)
    assert store.versions_in_use() == {"v2"}
