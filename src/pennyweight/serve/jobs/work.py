"""What is written down of a job while it trains: events, bill, checkpoints, and what it came to."""

from __future__ import annotations

import io
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from pennyweight.config import RunConfig
from pennyweight.errors import Interrupted
from pennyweight.finetune import RunResult
from pennyweight.lora import Adapter
from pennyweight.runs import RunFolder
from pennyweight.serve.jobs.telling import Log, event, usage_of
from pennyweight.serve.jobs.training import Ending
from pennyweight.serve.records import CheckpointRecord, JobRecord, ModelRecord
from pennyweight.serve.store import Store
from pennyweight.serve.uploads import Uploads
from pennyweight.serve.versions import Rendering, Versions, rendering_of

__all__ = ["Work"]

log = logging.getLogger("pennyweight.serve")
ESTIMATE_EVERY_S = 1.0


class Work:
    """One job in training: `tell`, `keep_checkpoint` and `end` are called in the order in which things
    happened, by a clerk. `fail` and `let_go` are the foreman's.
    """

    def __init__(
        self,
        job: JobRecord,
        run: RunConfig,
        *,
        store: Store,
        versions: Versions,
        uploads: Uploads,
        fail: Callable[[JobRecord, Exception], object],
        let_go: Callable[[str], object],
    ) -> None:
        self._job, self._store, self._versions, self._uploads = job, store, versions, uploads
        self._fail, self._let_go = fail, let_go
        self._run = RunFolder(Path(run.output_dir))
        hyper = job.hyperparameters
        steps = run.train.max_steps
        self._log = Log(
            job.id, self._run.events, None if steps else float(hyper["n_epochs"]), steps
        )
        self._rendering: Rendering | None = None
        self._began = self._estimated = 0.0
        self._began_at: int | None = None

    def tell(self, mark: str, seconds: float) -> None:
        """Bring the job's events and bill up to what its run has logged; `mark` took so long."""
        self._log.measured_s[mark] = seconds
        self._safely(self._tell)

    def keep_checkpoint(self, step: int, adapter: Adapter) -> None:
        """Let the adapter of a step that was saved be served."""
        self._safely(lambda: self._keep_checkpoint(step, adapter))

    def end(self, how: Ending) -> None:
        """Write down what the run came to."""
        try:
            self._tell()
            if isinstance(how, RunResult):
                self._succeed(how)
            if how is None or isinstance(how, RunResult):
                # Nobody resumes it; what is served are versions of their own.
                shutil.rmtree(self._run.checkpoints, ignore_errors=True)
            elif isinstance(how, Interrupted):
                self._wait()
            else:
                self._fail(self._job, how)
        except Exception as fault:
            self._fail(self._job, fault)
        finally:
            self._let_go(self._job.id)

    def _safely(self, act: Callable[[], object]) -> None:
        """What is not told now is told with the next: the run's log has it."""
        try:
            act()
        except Exception:
            log.exception("%s: its progress was not written down yet", self._job.id)

    def _tell(self) -> None:
        if self._log.held_out_tokens == 0 and self._run.held_out.is_dir():
            self._log.held_out_tokens = int(sum(self._run.read_held_out().rows.lengths))
        told = self._log.read()
        self._store.record_progress(self._job.id, told, lambda each: usage_of(self._job, each))
        self._estimate()

    def _estimate(self) -> None:
        """When it may be done, by the pace so far."""
        step, total, now = self._log.step, self._log.total_steps, time.monotonic()
        if self._began_at is None:
            self._began_at, self._began = step, now
        elif step > self._began_at and total and now - self._estimated > ESTIMATE_EVERY_S:
            self._estimated = now
            pace = (now - self._began) / (step - self._began_at)
            finish = int(time.time() + pace * (total - step))
            self._store.change_job(self._job.id, when=("running",), estimated_finish=finish)

    def _keep_checkpoint(self, step: int, adapter: Adapter) -> None:
        self._tell()
        if step == 0 or self._is_kept(step):
            return
        version = self._versions.keep(adapter, self._how_it_reads())
        name = f"{_model_name(self._job)}:ckpt-step-{step}"
        now = int(time.time())
        self._store.add_checkpoint(
            CheckpointRecord(
                id=f"ftckpt-{self._job.id.removeprefix('ftjob-')}-{step}",
                job_id=self._job.id,
                step=step,
                created_at=now,
                model=name,
                metrics=self._log.metrics(step),
            ),
            ModelRecord(name, self._job.owner, now, version, self._job.model, self._job.id),
        )
        said = f"Checkpoint created at step {step}"
        self._store.record_progress(
            self._job.id, [event(self._job.id, f"checkpoint {step}", said)], lambda _: None
        )

    def _is_kept(self, step: int) -> bool:
        where = {"job_id": self._job.id, "step": step}
        return self._store.count(CheckpointRecord, where) > 0

    def _how_it_reads(self) -> Rendering:
        if self._rendering is None:
            self._rendering = rendering_of(self._run)
        return self._rendering

    def _succeed(self, result: RunResult) -> None:
        version = self._versions.keep_folder(self._run.adapter, self._how_it_reads())
        name, now = _model_name(self._job), int(time.time())
        table = io.BytesIO(self._log.table().encode())
        results = self._uploads.keep_results(self._job.owner, f"{self._job.id}-metrics.csv", table)
        best = f", the best step is {result.best_step}" if result.best_step else ""
        self._store.finish_job(
            self._job.id,
            event(self._job.id, "succeeded", f"New fine-tuned model created: {name}{best}"),
            [ModelRecord(name, self._job.owner, now, version, self._job.model, self._job.id)],
            status="succeeded",
            finished_at=now,
            estimated_finish=None,
            fine_tuned_model=name,
            result_files={"ids": [results.id]},
        )

    def _wait(self) -> None:
        """It was paused, and stands so in the store; or the server ends, and the next one goes on."""
        self._store.change_job(self._job.id, when=("running",), status="validating_files")


def _model_name(job: JobRecord) -> str:
    """`ft:base:key:suffix:id`, as OpenAI names them."""
    return f"ft:{job.model}:{job.owner}:{job.suffix or ''}:{job.id.removeprefix('ftjob-')[:8]}"
