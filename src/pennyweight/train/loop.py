"""The loop: a generator that yields optimizer steps, and what asks it to end early."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from pennyweight.data.batch import Batch
from pennyweight.errors import Aborted, Interrupted
from pennyweight.train.trainee import Step, Trainee

__all__ = ["Due", "MicroBatch", "Step", "StopRequest", "pieces", "planned_steps", "train"]


def planned_steps(
    batches: Callable[[int], Sequence[Any]], *, epochs: float, accumulation: int
) -> int:
    """Optimizer steps in so many passes; each epoch ends with a step of its own, however short.

    Five micro-batches an epoch, accumulation 2, 1.5 epochs: 3 + 2 steps.
    """
    whole = int(epochs)
    steps = sum(math.ceil(len(batches(epoch)) / accumulation) for epoch in range(whole))
    if epochs > whole:
        last = math.ceil(len(batches(whole)) / accumulation)
        steps += math.ceil(round((epochs - whole) * last, 9))
    return max(1, steps)


def train(
    trainee: Trainee,
    batches: Callable[[int], Sequence[Sequence[int]]],
    collate: Callable[[Sequence[int]], Batch],
    *,
    total_steps: int,
    accumulation: int = 1,
    stop: Callable[[], object] = lambda: None,
) -> Iterator[Step]:
    """Yield optimizer steps from where the trainee stands up to `total_steps`, as `pieces` does."""
    for piece in pieces(
        trainee, batches, collate, total_steps=total_steps, accumulation=accumulation, stop=stop
    ):
        if isinstance(piece, Step):
            yield piece


@dataclass(frozen=True, slots=True)
class Due:
    """A micro-batch that is next. Whoever drives the run may let it share a pass with others';
    if it did not when the run goes on, it goes alone.
    """

    trainee: Trainee
    batch: Batch


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-batch that went forward and backward; its gradients wait for the step."""

    tokens: int
    trained_tokens: int


def pieces(
    trainee: Trainee,
    batches: Callable[[int], Sequence[Sequence[int]]],
    collate: Callable[[Sequence[int]], Batch],
    *,
    total_steps: int,
    accumulation: int = 1,
    stop: Callable[[], object] = lambda: None,
    ahead: bool = False,
) -> Iterator[Due | MicroBatch | Step]:
    """Yield every micro-batch and every optimizer step up to `total_steps`; with `ahead` also each
    micro-batch before it is run.

    `batches(epoch)` gives the micro-batches of an epoch as indices, a pure function; `collate` makes
    one of them a Batch. Ends early, between two steps, once `stop()` is true.
    """
    epoch, indices = -1, list[Sequence[int]]()
    while trainee.step < total_steps and not stop():
        if epoch != trainee.epoch:
            epoch, indices = trainee.epoch, list(batches(trainee.epoch))
            assert indices, "an epoch holds at least one micro-batch"
        window = indices[trainee.micro_batch : trainee.micro_batch + accumulation]
        for micro_batch in window:
            batch = collate(micro_batch)
            if ahead:
                yield Due(trainee, batch)
            if not trainee.holds(batch):
                trainee.forward_backward(batch)
            yield MicroBatch(batch.tokens, batch.trained_tokens)
        passes = trainee.advance(len(window), of=len(indices))
        yield trainee.optim_step(epoch=passes)


class StopRequest:
    """Listens for Ctrl-C and SIGTERM while it is open: the first asks, the second is Aborted.

    `with StopRequest() as stop: train(..., stop=stop)`; `stop()` is the signal's name, or None.
    A signal that was ignored before stays so (`nohup`, a shell's background jobs). Signals reach
    the main thread only; elsewhere it listens to nothing, and `ask` does the asking.
    """

    def __init__(self) -> None:
        self._asked: str | None = None
        self._twice = False
        self._saved: str | None = None
        self._before: dict[int, Any] = {}

    def __call__(self) -> str | None:
        return self._asked

    def ask(self, why: str) -> None:
        self._asked = why

    @contextmanager
    def at_once(self, saved: str) -> Iterator[None]:
        """Work that may be left unfinished: inside, the first request is Interrupted there and then.

        `saved` says what that loses, or that it loses nothing.
        """
        before, self._saved = self._saved, saved
        try:
            if self._asked is None:
                yield
        except _Now:
            if self._twice:
                raise
        finally:
            self._saved = before
        if self._asked is not None:
            raise Interrupted(f"{self._asked}: {saved}; the same command resumes")

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, _kind: object, fault: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before or signal.SIG_DFL)
        self._before = {}
        if isinstance(fault, _Now):
            raise Aborted(
                f"{fault} came after {self._asked}: stopped at once, nothing more is saved"
            ) from None

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self._asked is not None:
            self._twice = True
            raise _Now(name)
        self._asked = name
        if self._saved is not None:
            raise _Now(name)


class _Now(KeyboardInterrupt):
    """Raised where the signal found us. As Ctrl-C it passes every `except Exception` on its way."""
