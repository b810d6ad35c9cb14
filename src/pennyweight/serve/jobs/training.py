"""One job's lane: its run, beat by beat, in the engine's thread; what follows is left to a clerk."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from pennyweight.config import LoraConfig
from pennyweight.finetune import Beat, Beats, RunResult
from pennyweight.lora import Adapter, adapter_of, described
from pennyweight.model import BaseModel
from pennyweight.train import StopRequest

__all__ = ["Ending", "JobLane"]

Ending = RunResult | Exception | None


class JobLane:
    """A job in training.

    `told(mark, seconds)` is called after every beat that the run's log tells of, `saved(step,
    adapter)` with a copy of each adapter that was saved, and of the one that the run resumed with;
    `ended(how)` at last: with the result, the fault, or None where it was cancelled. `step_now` is
    the step that the run resumed from.
    """

    def __init__(
        self,
        begin: Callable[[BaseModel, str, StopRequest], Beats[RunResult]],
        base: BaseModel,
        config: LoraConfig,
        *,
        name: str,
        weight: float,
        told: Callable[[str, float], object],
        saved: Callable[[int, Adapter], Future[None]],
        ended: Callable[[Ending], object],
        step_now: Callable[[], int],
    ) -> None:
        self.weight, self.name = weight, name
        self.stop = StopRequest()
        self.cancelled = False
        self._base, self._config = base, config
        self._beats = begin(base, name, self.stop)
        self._told, self._saved, self._ended = told, saved, ended
        self._step_now, self._step = step_now, 0
        self._seconds: dict[str, float] = {"step": 0.0, "evaluation": 0.0}
        self._keeping: Future[None] | None = None
        self.busy = True

    def work(self) -> float:
        """The next beat; the tokens that ran through the model in it."""
        if self.cancelled:
            self._end(None)
            return 0.0
        began = time.perf_counter()
        try:
            beat = next(self._beats)
            self._after(beat, time.perf_counter() - began)
        except StopIteration as done:
            self._end(done.value)
        except Exception as fault:
            self._end(fault)
        else:
            return float(beat.tokens)
        return 0.0

    def _after(self, beat: Beat, seconds: float) -> None:
        if beat.kind in ("micro_batch", "stepped"):
            self._seconds["step"] += seconds
        elif beat.kind == "evaluated":
            self._seconds["evaluation"] += seconds
        if beat.kind == "stepped" and beat.step is not None:
            if self._keeping is not None:
                # A checkpoint may follow. Whoever resumes keeps the newest; the one before is kept.
                self._keeping.result()
            self._step = beat.step.number
            self._told(f"step {self._step}", self._take("step"))
        elif beat.kind == "evaluated" and not beat.tokens:
            self._told(f"evaluation {self._step}", self._take("evaluation"))
        elif beat.kind == "resumed":
            self._step = self._step_now()
        if beat.kind in ("resumed", "saved") and self._step:
            self._keeping = self._saved(self._step, self._copy())

    def _take(self, kind: str) -> float:
        seconds, self._seconds[kind] = self._seconds[kind], 0.0
        return seconds

    def _copy(self) -> Adapter:
        live = described(adapter_of(self._base, self.name, self._config), self._base)
        factors = {
            path: (a.detach().cpu().clone(), b.detach().cpu().clone())
            for path, (a, b) in live.factors.items()
        }
        kept: dict[str, Any] = {path: t.detach().cpu().clone() for path, t in live.saved.items()}
        return replace(live, factors=factors, saved=kept)

    def _end(self, how: Ending) -> None:
        self.busy = False
        try:
            self._beats.close()
        except Exception as fault:
            how = how or fault
        self._ended(how)
