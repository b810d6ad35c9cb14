"""The front page: a run's description in, an adapter (or a whole tuned model) out.

`finetune` is the way of one run; every stop is a line or two here and a room elsewhere. The same
description again resumes: all that the run needs to go on stands in its output folder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from pennyweight.config import RunConfig, origins, resolve
from pennyweight.data.prepare import prepare
from pennyweight.errors import Interrupted
from pennyweight.files import disk_faults
from pennyweight.finetune.parity import parity, parity_of
from pennyweight.finetune.rehearsal import corrected, rehearse
from pennyweight.finetune.seen import Seen, look
from pennyweight.finetune.underway import Run, RunResult, data_size, day_of, stop_id
from pennyweight.model import load_base
from pennyweight.plan import plan
from pennyweight.runs import RunFolder
from pennyweight.train import RunLock, StopRequest, enable_checkpointing, restart_peak, tidy, train

__all__ = ["AGAIN", "RunResult", "Seen", "finetune", "look", "parity"]

AGAIN = "free some space or mend the folder, then run the same command again"


def finetune(
    config: RunConfig,
    *,
    origin: Mapping[str, str] | None = None,
    text: str | None = None,
) -> RunResult:
    """Train what `config` describes; everything it makes is in `config.output_dir`.

    `origin` and `text` (where each value came from, the YAML as written) are kept beside the
    result, and the receipt tells them. Interrupted (exit code 75) after a signal, with a checkpoint that the same call resumes from.
    """
    began = time.perf_counter()
    origin = origin or origins(config)
    config = resolve(config)
    folder = RunFolder(Path(config.output_dir))
    with disk_faults(folder.path, AGAIN), RunLock(folder.path), StopRequest() as stop:
        tidy(folder.checkpoints)
        with stop.at_once("nothing was begun, so nothing is lost"):
            base = load_base(config.base, trainable=config.train.method == "full")
            data = prepare(
                config.data,
                base.tokenizer,
                seed=config.seed,
                stop_id=stop_id(base),
                day=day_of(folder),
            )
            agreed = parity_of(
                data, base.tokenizer, model=config.base.model, model_stop_ids=base.stop_ids
            )
            agreed.refuse()
            restart_peak(base.device)
            predicted = plan(config, rows=data_size(data))
            if predicted.recompute != "none" or config.train.gradient_checkpointing is True:
                enable_checkpointing(base)
        with Run(config, folder, base, data, stop) as run:
            with stop.at_once("no step was taken, so nothing is lost"):
                resumed = run.resume()
                folder.describe(config, origin=origin, text=text)
                data.ledger.write(folder.ledger)
                folder.keep_held_out(data, config.evaluate.max_rows)
                run.tell_parity(agreed)
                if run.trainee.step < run.total_steps:
                    predicted = rehearse(run, predicted, resumed=resumed is not None)
                run.introduce(predicted, resumed)
            run.settle()
            run.begin(time.perf_counter() - began)
            limit_tokens = run.trainee.limit_tokens
            for step in train(
                run.trainee,
                run.micro_batches,
                run.collated,
                total_steps=run.total_steps,
                accumulation=config.train.gradient_accumulation_steps,
                stop=lambda: stop() or run.stopped_early,
            ):
                run.after(step)
                if run.trainee.limit_tokens != limit_tokens:  # memory did not do after all
                    limit_tokens = run.trainee.limit_tokens
                    predicted = corrected(run, predicted)
            if stop():
                run.save()
                raise Interrupted(
                    f"{stop()} after step {run.trainee.step} of {run.total_steps}: everything is "
                    "saved, and the same command resumes"
                )
            with stop.at_once("every step is taken and saved, the result is not written"):
                return run.finish(predicted, resumed, origin)
