"""Worst first: what could end a run hours in is tried before its first step.

In turn: the disk's room against the plan, the heaviest micro-batch forward and backward beside
weights, gradients and moments, the heaviest evaluation batch, and (unless the run resumes) a
checkpoint of step 0 through the same write path. Nothing is left of it but that checkpoint and,
where memory did not do, smaller parts of a micro-batch: the run is the same to the bit.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pennyweight.errors import DiskError
from pennyweight.evaluate import evaluate_loss, in_batches, read_by
from pennyweight.finetune.beat import Beat, Beats
from pennyweight.finetune.learner import budget_tokens
from pennyweight.finetune.run import Run, data_size
from pennyweight.plan import DataSize, Plan, batch_peaks, of_batch
from pennyweight.train import peak_memory_bytes

__all__ = ["corrected", "heaviest", "rehearse", "undominated"]

# Rows whose place in every epoch's batches is looked up; beyond, the longest rows stand for all.
ROWS_LOOKED_UP = 2_000_000


def rehearse(run: Run, predicted: Plan, *, resumed: bool) -> Beats[Plan]:
    """Try the worst of the run; gives the plan, corrected where it promised too much.

    DiskError: too little room, or the folder cannot be written. MemoryExhausted: one row alone
    does not fit, named.
    """
    began = time.perf_counter()
    _refuse_full_disk(run, predicted)
    worst = heaviest(run, predicted)
    lengths = run.data.train.lengths[list(worst)]
    tokens = int(lengths.sum())
    # Until now rows might have come together that never do.
    predicted = of_batch(predicted, run.config, DataSize(len(worst), tokens, int(lengths.max())))
    run.report.say(
        f"worst first: {tokens:,} tokens at once, planned {_mb(predicted.counted_peak_bytes)} of "
        f"{_mb(predicted.budget_bytes)}"
    )
    corrected = yield from _passes(run, predicted, worst)
    evaluated = _evaluation(run)
    yield Beat("prepared", evaluated)
    if not resumed and run.save():
        yield Beat("saved")
    seconds = time.perf_counter() - began
    peak = peak_memory_bytes(run.base.device)
    run.report.event(
        "rehearsal",
        tokens=tokens,
        rows=[run.data.train[i].source for i in worst[:8]],
        limit_tokens=run.trainee.limit_tokens,
        evaluation_tokens=evaluated,
        saved=not resumed,
        planned_peak_bytes=corrected.counted_peak_bytes,
        peak_memory_bytes=peak,
        seconds=seconds,
    )
    run.report.say(
        f"rehearsed in {seconds:.1f} s: forward and backward, "
        + (f"{evaluated:,} tokens evaluated, " if evaluated else "")
        + ("" if resumed else "a checkpoint saved, ")
        + (f"peak {_mb(peak)}" if peak is not None else "peak unknown")
    )
    return corrected


def heaviest(run: Run, predicted: Plan) -> tuple[int, ...]:
    """The micro-batch of the rest of the run whose predicted peak is highest, as its rows' indices.

    Memory grows with a batch's tokens, its longest document and its trained tokens, so only
    batches that no other exceeds in all three are asked about.
    """
    batches = sorted(_to_come(run))
    lengths, trained = run.data.train.lengths, run.data.train.trained_lengths
    sizes = np.array(
        [[lengths[r].sum(), lengths[r].max(), trained[r].sum()] for r in map(list, batches)]
    )
    front = undominated(sizes)
    asked = [DataSize(len(batches[i]), int(sizes[i, 0]), int(sizes[i, 1])) for i in front]
    peaks = batch_peaks(run.config, asked, device=predicted.device, policy=predicted.recompute)
    ranked = zip(peaks, (tuple(sizes[i].tolist()) for i in front), front, strict=True)
    return batches[max(ranked)[2]]


def undominated(sizes: np.ndarray) -> list[int]:
    """Indices of the rows of `[batches, measures]` that no other row reaches in every measure."""
    _, firsts = np.unique(sizes, axis=0, return_index=True)
    front: list[int] = []
    # Largest first, so that a row can only be exceeded by one that was seen before it.
    for i in firsts[np.lexsort(sizes[firsts].T[::-1])][::-1].tolist():
        if not any((sizes[j] >= sizes[i]).all() for j in front):
            front.append(i)
    return front


def _to_come(run: Run) -> set[tuple[int, ...]]:
    """Every different micro-batch from the present epoch to the last step."""
    batches: set[tuple[int, ...]] = set()
    steps, rows, epoch = run.trainee.step, 0, run.trainee.epoch
    accumulation = run.config.train.gradient_accumulation_steps
    while not batches or (steps < run.total_steps and rows < ROWS_LOOKED_UP):
        of_epoch = run.micro_batches(epoch)
        batches.update(tuple(sorted(batch)) for batch in of_epoch)
        steps += math.ceil(len(of_epoch) / accumulation)
        rows, epoch = rows + len(run.data.train), epoch + 1
    if steps < run.total_steps:
        batches.add(_longest_together(run))
    return batches


def _longest_together(run: Run) -> tuple[int, ...]:
    """As many of the longest rows as a micro-batch can hold: no batch of any epoch is heavier."""
    lengths = run.data.train.lengths
    longest_first = np.argsort(-lengths, kind="stable")
    budget = budget_tokens(run.config)
    if budget is None:
        chosen = longest_first[: run.config.train.batch_size]
    else:
        chosen = longest_first[: max(1, int((lengths[longest_first].cumsum() <= budget).sum()))]
    return tuple(sorted(chosen.tolist()))


def _passes(run: Run, predicted: Plan, worst: Sequence[int]) -> Beats[Plan]:
    """The training passes; the plan they leave true."""
    accumulating = run.config.train.gradient_accumulation_steps > 1
    passes = 2 if accumulating else 1
    batch = run.collated(worst)
    said = list(run.trainee.rehearse(batch, accumulating=accumulating))
    yield Beat("prepared", passes * batch.tokens)
    if run.trainee.limit_tokens is not None:  # a row longer than the parts goes alone
        batch = run.collated([int(np.argmax(run.data.train.lengths))])
        said += run.trainee.rehearse(batch, accumulating=accumulating)
        yield Beat("prepared", passes * batch.tokens)
    for notice in said:
        run.notice(notice)
    return predicted if run.trainee.limit_tokens is None else corrected(run, predicted)


def corrected(run: Run, predicted: Plan) -> Plan:
    """The plan with the memory of the parts that micro-batches now go in, said."""
    longest = data_size(run.data).longest
    assert run.trainee.limit_tokens is not None
    tokens = max(run.trainee.limit_tokens, longest)
    revised = of_batch(predicted, run.config, DataSize(1, tokens, longest))
    run.report.event(
        "plan_corrected",
        micro_batch_tokens=revised.micro_batch_tokens,
        planned_peak_bytes=predicted.counted_peak_bytes,
        corrected_peak_bytes=revised.counted_peak_bytes,
    )
    run.report.say(
        f"plan corrected: {predicted.micro_batch_tokens:,} tokens at once, planned at "
        f"{_mb(predicted.counted_peak_bytes)}, did not fit; {revised.micro_batch_tokens:,} take "
        f"{_mb(revised.counted_peak_bytes)}"
    )
    return revised


def _evaluation(run: Run) -> int:
    """The heaviest evaluation batch, smaller ones where memory does not do; its tokens."""
    rows = run.held_out_rows
    run.give_back()
    while len(rows):
        batches = in_batches(rows, budget_tokens=run.evaluation_tokens)
        batch = max(batches, key=lambda it: (it.tokens, int(np.diff(it.boundaries).max())))
        report = evaluate_loss(run.base, read_by([batch], run.slot))
        run.give_back()
        if report.limit_tokens is None:
            return batch.tokens
        run.evaluate_within(report.limit_tokens)
    return 0


def _refuse_full_disk(run: Run, predicted: Plan) -> None:
    """DiskError where the plan's checkpoints and result do not fit beside what is there."""
    kept = run.config.train.save_total_limit + 1
    one, result = predicted.disk.checkpoints // kept, predicted.disk.output
    here = _bytes_in(run.folder.checkpoints)
    # The next checkpoint is whole before the oldest goes.
    needed = max(one, (kept + 1) * one - here) + result
    free = shutil.disk_usage(run.folder.path).free
    if free < needed:
        raise DiskError(
            f"{run.folder.path}: the run will write {_mb(needed)} ({kept} checkpoints of "
            f"{_mb(one)} and one more while it is written, {_mb(result)} for the result"
            + (f", less {_mb(here)} there already" if here else "")
            + f"), {_mb(free)} are free; free some space, lower train.save_total_limit, or name "
            "another output_dir"
        )


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _mb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
