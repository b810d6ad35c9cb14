"""What a job would learn from and what it would take, before anything has started."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pennyweight.config import RunConfig, named_paths, public
from pennyweight.data.prepare import Prepared
from pennyweight.data.preview import Shown
from pennyweight.errors import MemoryExhausted, PennyweightError
from pennyweight.finetune import look as look_at_rows
from pennyweight.finetune import prepared
from pennyweight.plan import Plan
from pennyweight.plan.table import as_duration, as_size
from pennyweight.serve.jobs import CreateJob
from pennyweight.serve.pace import job_seconds
from pennyweight.serve.refusals import Refused
from pennyweight.serve.service import Service

__all__ = ["Look", "look"]

ROWS_SHOWN, MOST_LINES, LONGEST_LINE = 3, 20, 400
PATIENCE_S = 10.0  # with the measuring of this machine, which began with the form


@dataclass(frozen=True, slots=True)
class Look:
    """Rows as the model reads them, the ledger's lines, the plan in words; or why not, a line each."""

    faults: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    shown: tuple[Shown, ...] = ()
    plan: Mapping[str, Any] | None = None
    fits: bool = False

    @property
    def ready(self) -> bool:
        return self.fits and not self.faults


def look(service: Service, owner: str, asked: CreateJob) -> Look:
    """Settle the job as it would be settled, render its rows, and plan its memory; no weight is read."""
    try:
        run = service.jobs.draft(owner, asked)
        seen = look_at_rows(run, ROWS_SHOWN)
        if seen.refusal:
            return Look(_shortened(seen.refusal, run), _shortened(seen.lines, run), seen.shown)
        data = prepared(run)
        predicted = service.memory.planned(run, data)
        why = _too_large(service, run, data)
    except Refused:
        raise
    except PennyweightError as fault:
        if not isinstance(fault, ValueError):  # the server's own trouble, not the rows'
            raise
        return Look(_shortened(str(fault).splitlines()))
    told = _told(predicted, why) | {"seconds": _seconds(service, run, data)}
    return Look((), _shortened(seen.lines, run), seen.shown, told, why is None)


def _seconds(service: Service, run: RunConfig, data: Prepared) -> str:
    """What the job would take, in words; nothing where this machine's speed is not known."""
    device = service.pace.device(PATIENCE_S)
    if device is None:
        return ""
    took = job_seconds(service.memory.planned(run, data, device), run, data)
    return "" if took is None else as_duration(took)


def _too_large(service: Service, run: RunConfig, data: Prepared) -> str | None:
    """Why the job would be refused for its memory; None where it would not."""
    try:
        service.memory.need(run, data)
    except MemoryExhausted as fault:
        return str(fault)
    return None


def _shortened(lines: Iterable[str], run: RunConfig | None = None) -> tuple[str, ...]:
    """The first lines, fit for anybody's eyes: names of files, not where the server keeps them."""
    known = None if run is None else named_paths(run)
    told = [str(public(line, known))[:LONGEST_LINE] for line in lines]
    more = len(told) - MOST_LINES
    return (*told[:MOST_LINES], *([f"and {more:,} more"] if more > 0 else []))


def _told(predicted: Plan, why: str | None) -> dict[str, Any]:
    """The plan in words and figures of a page."""
    cost = predicted.cost
    return {
        "said": "It fits." if why is None else f"It does not fit: {why}.",
        "peak": as_size(predicted.peak_bytes),
        "budget": f"{as_size(predicted.budget_bytes)} on {predicted.device.name}",
        "steps": "" if cost.steps is None else f"{cost.steps:,}",
        "trained": f"{predicted.trained_parameters:,}",
        "share": f"{predicted.trained_parameters / predicted.parameters:.2%}",
    }
