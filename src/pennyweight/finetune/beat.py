"""A run in pieces: what was just done, and pieces that a stop request may leave unfinished.

Between two beats the model is nobody's: whoever drives a run may let another, or a chat, go on.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from pennyweight.train import Due, Step, StopRequest

__all__ = ["Beat", "Beats", "at_once", "outcome", "timed"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Beat:
    """A piece of work just done.

    `due`, where it is asked for: the micro-batch that comes next, which may share a pass.
    `prepared`: base and data are here, then each trial of the rehearsal. `resumed`: the weights are
    those of the checkpoint that the run goes on from. `evaluated`: a batch of
    held-out rows, and one beat more without tokens for the whole evaluation, with its `loss`.
    `micro_batch`: forward and backward. `stepped`: the optimizer's, told and logged. `saved`: a
    checkpoint. `tokens` ran through the model in this piece, `trained_tokens` of them towards a
    step; on a GPU `seconds` is the time to hand the work over, up to the next figure read back.
    """

    kind: Literal["prepared", "resumed", "evaluated", "due", "micro_batch", "stepped", "saved"]
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    step: Step | None = None
    loss: float | None = None
    due: Due | None = None


Beats = Generator[Beat, None, T]


def at_once(stop: StopRequest, work: Beats[T], saved: str) -> Beats[T]:
    """The same beats, each of which a request to stop ends there and then, as `stop.at_once` does.

    While a beat is handed over nothing is cut short: a signal that comes then ends the next one.
    """
    with closing(work):
        while True:
            with stop.at_once(saved):
                try:
                    beat = next(work)
                except StopIteration as done:
                    result: T = done.value
                    return result
            yield beat


def timed(work: Beats[T]) -> Beats[T]:
    """The same beats with the seconds that each took, those of whoever drives it left out."""
    with closing(work):
        while True:
            began = time.perf_counter()
            try:
                beat = next(work)
            except StopIteration as done:
                result: T = done.value
                return result
            yield replace(beat, seconds=time.perf_counter() - began)


def outcome(work: Beats[T]) -> T:
    """Go through all beats; what the work came to."""
    with closing(work):
        while True:
            try:
                next(work)
            except StopIteration as done:
                result: T = done.value
                return result
