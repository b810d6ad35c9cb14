"""What clients ask of jobs: a new one, a look at one, its end, a pause; written to the store and no more.

The foreman brings about what stands there.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from pennyweight.config import RunConfig
from pennyweight.serve.jobs.asked import CreateJob, settings_of
from pennyweight.serve.jobs.settle import count_rows, described
from pennyweight.serve.jobs.telling import event
from pennyweight.serve.records import JobRecord
from pennyweight.serve.refusals import absent, busy, invalid
from pennyweight.serve.settings import ServeSettings
from pennyweight.serve.store import Store
from pennyweight.serve.uploads import Uploads

__all__ = ["UNENDED", "Orders"]

UNENDED = ("validating_files", "queued", "running", "paused")


class Orders:
    """Of all keys, from anybody's thread. `nudge` tells the foreman that something changed."""

    def __init__(
        self,
        settings: ServeSettings,
        store: Store,
        uploads: Uploads,
        *,
        max_positions: int,
        nudge: Callable[[], object],
    ) -> None:
        self._settings, self._store, self._uploads = settings, store, uploads
        self._max_positions, self._nudge = max_positions, nudge

    def create(self, owner: str, asked: CreateJob, idempotency_key: str | None = None) -> JobRecord:
        """A new job, durable before it is acknowledged; or the one that this key made before."""
        asked.settled()
        settings_of(asked, max_rank=self._settings.jobs.max_rank)
        if asked.model != self._settings.base_id:
            raise invalid(
                f"model {asked.model[:100]!r}: only {self._settings.base_id!r} can be tuned here",
                param="model",
                code="model_not_found",
            )
        self._uploads.get(owner, asked.training_file, param="training_file")
        if asked.validation_file is not None:
            self._uploads.get(owner, asked.validation_file, param="validation_file")
        plain = asked.model_dump(mode="json", exclude_none=True)
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        named = f"ftjob-{secrets.token_hex(12)}"
        job = JobRecord(
            id=named,
            owner=owner,
            created_at=int(time.time()),
            status="validating_files",
            model=asked.model,
            training_file=asked.training_file,
            validation_file=asked.validation_file,
            seed=secrets.randbelow(2**31) if asked.seed is None else asked.seed,
            suffix=asked.suffix,
            priority=asked.priority,
            asked=plain,
            hyperparameters=asked.settled().model_dump(),
            metadata=asked.metadata or {},
        )
        first = event(named, "created", f"Created fine-tuning job: {named}")
        key = None if idempotency_key is None else (idempotency_key, digest)
        most = self._settings.jobs.live_per_key
        try:
            kept_job, _ = self._store.create_job(job, first, idempotency=key, most_live=most)
        except ValueError:
            raise invalid(
                "Idempotency-Key: it was used for another request; use a new one",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            ) from None
        except OverflowError:
            raise busy(
                f"{most} jobs of this key have not ended: wait for one, or cancel one",
                retry_after_s=30,
            ) from None
        self._nudge()
        return kept_job

    def draft(self, owner: str, asked: CreateJob) -> RunConfig:
        """The run that a request would become; nothing is kept, and nothing begins."""
        train = self._uploads.get(owner, asked.training_file, param="training_file")
        path = self._uploads.path(train)
        run, _ = described(
            asked,
            rows=count_rows(path),
            train=path,
            held_out=None,
            seed=asked.seed or 0,
            output_dir=self._settings.data_path / "jobs" / "draft",
            settings=self._settings,
            max_positions=self._max_positions,
        )
        return run

    def get(self, owner: str, job_id: str) -> JobRecord:
        found = self._store.get(JobRecord, job_id, owner)
        if found is None:
            raise absent("fine-tuning job", job_id)
        return found

    def cancel(self, owner: str, job_id: str) -> JobRecord:
        """End it now; the steps it made are paid, its checkpoints stay."""
        return self._turn(
            owner,
            job_id,
            when=UNENDED,
            status="cancelled",
            said="The job was cancelled",
            finished_at=int(time.time()),
        )

    def pause(self, owner: str, job_id: str) -> JobRecord:
        """Save it as it stands, and let it wait."""
        return self._turn(owner, job_id, when=UNENDED, status="paused", said="The job was paused")

    def resume(self, owner: str, job_id: str) -> JobRecord:
        """Go on where it was paused."""
        return self._turn(
            owner, job_id, when=("paused",), status="validating_files", said="The job was resumed"
        )

    def _turn(
        self, owner: str, job_id: str, *, when: tuple[str, ...], status: str, said: str, **more: Any
    ) -> JobRecord:
        before = self.get(owner, job_id)
        mark = f"{status} {secrets.token_hex(4)}"
        changed = self._store.change_job(
            job_id, when=when, event=event(job_id, mark, said), status=status, **more
        )
        if changed is None:
            now = self.get(owner, job_id)
            if now.status == status:
                return now
            raise invalid(
                f"{job_id}: the job is {now.status or before.status}, and cannot be {status} now",
                code="job_not_in_a_fitting_state",
            )
        self._nudge()
        return changed
