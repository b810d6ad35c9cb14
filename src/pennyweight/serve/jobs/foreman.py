"""The foreman: which job is looked over, which trains, and what becomes of it.

The store is the truth and holds what was asked; the foreman brings about what stands there. He may
be killed at any instant: at the next start every job that has not ended is taken up again, from its
run's last checkpoint.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pennyweight.config import RunConfig, public
from pennyweight.errors import (
    ConfigError,
    DataError,
    DiskError,
    DivergedError,
    MemoryExhausted,
    PennyweightError,
)
from pennyweight.finetune import prepared, underway
from pennyweight.model import BaseModel
from pennyweight.serve.engine import Engine
from pennyweight.serve.jobs.asked import PRIORITIES, CreateJob
from pennyweight.serve.jobs.orders import UNENDED
from pennyweight.serve.jobs.settle import count_rows, described, keep, kept
from pennyweight.serve.jobs.telling import event, last_step
from pennyweight.serve.jobs.training import JobLane
from pennyweight.serve.jobs.work import Work
from pennyweight.serve.memory import Memory, Need
from pennyweight.serve.records import JobRecord
from pennyweight.serve.refusals import one_line
from pennyweight.serve.settings import ServeSettings
from pennyweight.serve.store import Store
from pennyweight.serve.uploads import Uploads
from pennyweight.serve.versions import Versions

__all__ = ["Foreman"]

log = logging.getLogger("pennyweight.serve")
LOOK_AGAIN_S = 5.0
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (DataError, "invalid_training_file"),
    (MemoryExhausted, "out_of_memory"),
    (DivergedError, "diverged"),
    (ConfigError, "invalid_hyperparameters"),
)


class Foreman:
    """Jobs of all keys, as the store has them; the work is the engine's and the clerk's."""

    def __init__(
        self,
        settings: ServeSettings,
        store: Store,
        uploads: Uploads,
        versions: Versions,
        engine: Engine,
        base: BaseModel,
        memory: Memory,
        clerk: Executor,
    ) -> None:
        self._settings, self._store, self._uploads = settings, store, uploads
        self._versions, self._engine, self._base = versions, engine, base
        self._memory = memory
        self._needs: dict[str, Need] = {}
        self._waits: str | None = None  # the job for which memory is being kept
        self._clerk = clerk
        self._folder = settings.data_path / "jobs"
        self._lanes: dict[str, JobLane] = {}
        self._looked_over: set[str] = set()
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._draining = False
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._thread = threading.Thread(target=self._run, name="foreman", daemon=True)

    def start(self) -> None:
        """Take up every job that has not ended."""
        for job in self._store.all(JobRecord, {"status": ("queued", "running")}):
            # Looked over again, for what was prepared may be gone from the cache.
            self._store.change_job(job.id, when=("queued", "running"), status="validating_files")
        self._thread.start()

    def nudge(self) -> None:
        self._wake.set()

    def drain(self) -> None:
        """Begin no more, and let what trains save itself. May be called by a signal."""
        if self._draining:
            return
        self._draining = True
        with self._lock:
            for lane in self._lanes.values():
                lane.stop.ask("the server is ending")
        self.nudge()

    def end(self) -> None:
        """After the engine has ended."""
        self.drain()
        self._readers.shutdown(wait=True, cancel_futures=True)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._draining:
            self._wake.wait(LOOK_AGAIN_S)
            self._wake.clear()
            try:
                self._look_around()
            except Exception:
                # The store may be full or gone for a while; jobs wait there meanwhile.
                log.exception("the foreman could not look after the jobs")
                time.sleep(1)

    def _look_around(self) -> None:
        """Bring about what the store holds."""
        with self._lock:
            lanes = dict(self._lanes)
        for job_id, lane in lanes.items():
            job = self._store.get(JobRecord, job_id)
            assert job is not None, "jobs are never deleted"
            if job.status == "cancelled":
                lane.cancelled = True
                self._engine.nudge()
            elif job.status in ("paused", "validating_files"):
                # Resumed before the pause was seen: its run saves itself all the same, and goes on.
                lane.stop.ask("paused")
        mine = {"model": self._settings.base_id}
        for job in self._store.all(JobRecord, {"status": "validating_files", **mine}):
            if job.id not in self._looked_over and job.id not in lanes:
                self._looked_over.add(job.id)
                self._readers.submit(self._look_over, job)
        self._begin_those_that_fit(self._store.all(JobRecord, {"status": "queued", **mine}))

    def _begin_those_that_fit(self, waiting: list[JobRecord]) -> None:
        """In their order; behind one that waits for memory nobody goes first."""
        waits: str | None = None
        while waiting and len(self._lanes) < self._settings.jobs.running and not self._draining:
            job = self._next(waiting)
            waiting.remove(job)
            if job.id in self._lanes:
                continue
            need = self._needs[job.id]
            if not self._engine.admit(job.id, need):
                waits = job.id
                said = self._memory.waiting_in_words(need)
                self._store.record_progress(
                    job.id, [event(job.id, "waits for memory", said)], lambda _: None
                )
                break
            if not self._begun(job):
                self._engine.leave(job.id)
        if waits is None and self._waits is not None:
            self._engine.nobody_waits()
        self._waits = waits

    def _next(self, waiting: list[JobRecord]) -> JobRecord:
        """The highest priority first, then the owner with the fewest in training, then the oldest."""
        with self._lock:
            training = [self._store.get(JobRecord, job_id) for job_id in self._lanes]
        owners = Counter(job.owner for job in training if job is not None)
        return min(waiting, key=lambda job: (-PRIORITIES[job.priority], owners[job.owner], job.seq))

    def _look_over(self, job: JobRecord) -> None:
        """Settle a job and prepare its rows, away from the model; then it waits for its turn."""
        try:
            if (now := self._store.get(JobRecord, job.id)) is None or self._draining:
                return
            if now.status != "validating_files":
                return
            run, hyper = self._settled(job)
            data = prepared(run)
            self._needs[job.id] = self._memory.need(run, data)
            rows = data.ledger.summary()
            said = f"Files validated: {len(data.train):,} rows to train on, {len(data.eval):,} held out"
            self._store.change_job(
                job.id,
                when=("validating_files",),
                event=event(job.id, "validated", said, data={"rows": public(rows)}),
                status="queued",
                hyperparameters=hyper,
            )
        except Exception as fault:
            self._fail(job, fault)
        finally:
            self._looked_over.discard(job.id)
            self.nudge()

    def _settled(self, job: JobRecord) -> tuple[RunConfig, dict[str, Any]]:
        folder = self._folder / job.id
        if (folder / "job.json").is_file():
            return kept(folder), dict(job.hyperparameters)
        train = self._uploads.get(job.owner, job.training_file, param="training_file")
        held = None
        if job.validation_file is not None:
            held = self._uploads.get(job.owner, job.validation_file, param="validation_file")
        path = self._uploads.path(train)
        run, hyper = described(
            CreateJob.model_validate(job.asked),
            rows=count_rows(path),
            train=path,
            held_out=None if held is None else self._uploads.path(held),
            seed=job.seed,
            output_dir=folder,
            settings=self._settings,
            max_positions=self._base.max_positions,
        )
        keep(run)
        return run, hyper

    def _begun(self, job: JobRecord) -> bool:
        """Give a job that has its memory to the engine; False where it cannot begin."""
        try:
            run = kept(self._folder / job.id)
        except PennyweightError as fault:
            self._fail(job, fault)
            return False
        changed = self._store.change_job(
            job.id,
            when=("queued",),
            event=event(job.id, "started", "Fine-tuning job started"),
            status="running",
        )
        if changed is None:  # cancelled or paused in between
            return False
        work = Work(
            changed,
            run,
            store=self._store,
            versions=self._versions,
            uploads=self._uploads,
            fail=self._fail,
            let_go=self._let_go,
        )
        lane = JobLane(
            lambda base, name, stop: underway(
                run, base=base, name=name, stop=stop, beside_bytes=self._memory.jobs_bytes
            ),
            self._base,
            run.adapter,
            name=job.id,
            weight=PRIORITIES[job.priority],
            told=lambda mark, seconds: self._clerk.submit(work.tell, mark, seconds),
            saved=lambda step, adapter: self._clerk.submit(work.keep_checkpoint, step, adapter),
            step_now=lambda: last_step(Path(run.output_dir) / "events.jsonl"),
            ended=lambda how: self._clerk.submit(work.end, how),
        )
        with self._lock:
            self._lanes[job.id] = lane
            if self._draining:
                lane.stop.ask("the server is ending")
        self._engine.train(lane)
        return True

    def _let_go(self, job_id: str) -> None:
        self._needs.pop(job_id, None)  # first: without a lane it may be looked over again
        with self._lock:
            self._lanes.pop(job_id, None)
        self._uploads.sweep()
        self.nudge()

    def _fail(self, job: JobRecord, fault: Exception) -> None:
        """A job that cannot be done says so, and why."""
        if isinstance(fault, DiskError):
            log.error("%s: %s", job.id, one_line(str(fault)))
            said = "The server's disk refused; the job waits, resume it once there is room"
            mark = f"disk {secrets.token_hex(4)}"
            self._store.change_job(
                job.id, when=UNENDED, event=event(job.id, mark, said, level="warn"), status="paused"
            )
            return
        code = next((code for kind, code in _CODES if isinstance(fault, kind)), "internal_error")
        if code == "internal_error":
            log.error("%s failed inside", job.id, exc_info=fault)
            said = "something went wrong inside"
        else:
            said = str(public(str(fault)))[:4000]
        param = "training_file" if code == "invalid_training_file" else None
        self._store.finish_job(
            job.id,
            event(job.id, "failed", f"The job failed: {one_line(said)}", level="error"),
            [],
            status="failed",
            finished_at=int(time.time()),
            error={"code": code, "message": said, "param": param},
        )
        self._let_go(job.id)
