"""The front page: a run's description in, an adapter (or a whole tuned model) out.

`finetune` is the way of one run; every stop is a line or two here and a room elsewhere. The same
description again resumes: all that the run needs to go on stands in its output folder. `underway`
is that way beat by beat, over a base that may be resident already and shared with others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pennyweight.config import RunConfig, origins, resolve
from pennyweight.data.prepare import Prepared, prepare
from pennyweight.errors import ConfigError, Interrupted
from pennyweight.files import disk_faults
from pennyweight.finetune.beat import Beat, Beats, at_once, outcome, timed
from pennyweight.finetune.learner import require_this_base
from pennyweight.finetune.parity import parity, parity_of
from pennyweight.finetune.rehearsal import corrected, rehearse
from pennyweight.finetune.result import RunResult
from pennyweight.finetune.run import EVALUATION_TOKENS, Run, data_size, day_of, stop_id
from pennyweight.finetune.seen import Seen, look
from pennyweight.model import BaseModel, load_base, load_tokenizer, stop_ids
from pennyweight.plan import FIRST_USE_BYTES, Device, named_device, plan, resident_bytes
from pennyweight.runs import RunFolder
from pennyweight.train import Due, RunLock, Step, StopRequest, pieces, restart_peak, tidy

__all__ = [
    "AGAIN",
    "EVALUATION_TOKENS",
    "Beat",
    "Beats",
    "RunResult",
    "Seen",
    "data_size",
    "finetune",
    "look",
    "outcome",
    "parity",
    "prepared",
    "underway",
]

AGAIN = "free some space or mend the folder, then run the same command again"


def finetune(
    config: RunConfig,
    *,
    origin: Mapping[str, str] | None = None,
    text: str | None = None,
    device: Device | None = None,
) -> RunResult:
    """Train what `config` describes; everything it makes is in `config.output_dir`.

    `origin` and `text` (where each value came from, the YAML as written) are kept beside the
    result, and the receipt tells them. `device`: this machine as it was measured, for the plan.
    Interrupted (exit code 75) after a signal, with a checkpoint that the same call resumes from.
    """
    with StopRequest() as stop:
        return outcome(underway(config, origin=origin, text=text, stop=stop, device=device))


def underway(
    config: RunConfig,
    *,
    base: BaseModel | None = None,
    name: str = "default",
    data: Prepared | None = None,
    origin: Mapping[str, str] | None = None,
    text: str | None = None,
    stop: StopRequest | None = None,
    ahead: bool = False,
    beside_bytes: int | None = None,
    device: Device | None = None,
) -> Beats[RunResult]:
    """`finetune` beat by beat; between two beats the model is nobody's.

    On a resident `base` the adapter is attached as `name` while the run is under way, and the
    process's random states are left alone, so several runs may take turns and each ends as it
    would alone, to the bit. ConfigError where the base is not the one described, or the run would
    train it whole. `data`: what `prepared` gave. `stop.ask(why)` saves, then raises Interrupted.
    Closing the generator leaves the last checkpoint, takes the adapter off and lets the folder go.
    `ahead`: a beat `due` comes before each micro-batch, for `forward_backward_together`.
    `beside_bytes`: the memory it may take beside a resident base, to which it is planned.
    """
    stop = stop or StopRequest()
    return timed(_way(config, base, name, data, origin, text, stop, ahead, beside_bytes, device))


def prepared(config: RunConfig) -> Prepared:
    """The rows that `underway` would prepare, from a tokenizer of its own and without any weight:
    it may run ahead, in another thread."""
    config = resolve(config)
    tokenizer = load_tokenizer(config.base.model)
    ends = stop_ids(config.base.model, tokenizer)
    return prepare(
        config.data,
        tokenizer,
        seed=config.seed,
        stop_id=ends[0] if ends else None,
        day=day_of(RunFolder(Path(config.output_dir))),
    )


def _way(
    config: RunConfig,
    base: BaseModel | None,
    name: str,
    data: Prepared | None,
    origin: Mapping[str, str] | None,
    text: str | None,
    stop: StopRequest,
    ahead: bool,
    beside_bytes: int | None,
    device: Device | None,
) -> Beats[RunResult]:
    began = time.perf_counter()
    origin = origin or origins(config)
    config = resolve(config)
    if config.adapters.list or config.adapters.grid:
        raise ConfigError(
            "adapters: describes several runs, and this trains one; `pennyweight train`, or "
            "`pennyweight.sweep.sweep`, trains them all"
        )
    folder = RunFolder(Path(config.output_dir))
    alone = base is None
    with disk_faults(folder.path, AGAIN), RunLock(folder.path):
        tidy(folder.checkpoints)
        with stop.at_once("nothing was begun, so nothing is lost"):
            held = resident_bytes()
            if base is None:
                base = load_base(config.base, trainable=config.train.method == "full")
            else:
                require_this_base(config, base)
            if data is None:
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
            if alone:
                restart_peak(base.device)
            device = device or named_device(config.base.device)
            if alone and device.kind == "cpu" and held is not None:
                device = replace(device, process_bytes=held + FIRST_USE_BYTES)
            predicted = plan(config, device=device, rows=data_size(data), beside_bytes=beside_bytes)
        yield Beat("prepared")
        with Run(config, folder, base, data, stop, predicted, name=name, alone=alone) as run:
            with stop.at_once("no step was taken, so nothing is lost"):
                resumed = run.resume()
                folder.describe(config, origin=origin, text=text)
                data.ledger.write(folder.ledger)
                folder.keep_held_out(data, config.evaluate.max_rows)
                run.tell_parity(agreed)
            if resumed is not None:
                yield Beat("resumed")
            if run.trainee.step < run.total_steps:
                trial = rehearse(run, predicted, resumed=resumed is not None)
                predicted = yield from at_once(stop, trial, "no step was taken, so nothing is lost")
            yield from at_once(
                stop, run.introduce(predicted, resumed), "no step was taken, so nothing is lost"
            )
            yield from run.settle()
            run.begin(time.perf_counter() - began)
            limit_tokens = run.trainee.limit_tokens
            for piece in pieces(
                run.trainee,
                run.micro_batches,
                run.collated,
                total_steps=run.total_steps,
                accumulation=config.train.gradient_accumulation_steps,
                stop=lambda: stop() or run.stopped_early,
                ahead=ahead,
            ):
                if isinstance(piece, Due):
                    yield Beat("due", due=piece)
                    continue
                if not isinstance(piece, Step):
                    yield Beat("micro_batch", piece.tokens, piece.trained_tokens)
                    continue
                yield from run.after(piece)
                if run.trainee.limit_tokens != limit_tokens:  # memory did not do after all
                    limit_tokens = run.trainee.limit_tokens
                    predicted = corrected(run, predicted)
            if stop():
                run.save()
                raise Interrupted(
                    f"{stop()} after step {run.trainee.step} of {run.total_steps}: everything is "
                    "saved, and the same command resumes"
                )
            return (
                yield from at_once(
                    stop,
                    run.finish(predicted, resumed, origin),
                    "every step is taken and saved, the result is not written",
                )
            )
