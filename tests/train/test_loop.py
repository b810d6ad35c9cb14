"""The loop: what it plans, where it ends, and how signals end it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from itertools import islice

import pytest

from pennyweight.data.batch import Batch
from pennyweight.errors import Aborted
from pennyweight.train import StopRequest, Trainee, planned_steps, train

BatchOf = Callable[..., Batch]


def batches(epoch: int) -> list[tuple[int, ...]]:
    """Five micro-batches in even epochs, four in odd ones, as packing may give."""
    places = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    return places if epoch % 2 == 0 else [(0, 1, 2), *places[2:]]


@pytest.mark.parametrize(
    ("epochs", "accumulation", "steps"),
    [(1, 1, 5), (2, 1, 9), (1, 2, 3), (2, 2, 5), (3, 4, 5), (0.5, 1, 3), (1.5, 2, 4), (1e-9, 1, 1)],
)
def test_steps_are_known_in_advance(epochs: float, accumulation: int, steps: int) -> None:
    assert planned_steps(batches, epochs=float(epochs), accumulation=accumulation) == steps


def test_steps_taken_are_the_steps_planned(trainee: Trainee, batch_of: BatchOf) -> None:
    total = planned_steps(batches, epochs=2.0, accumulation=2)
    steps = list(train(trainee, batches, lambda p: batch_of(*p), total_steps=total, accumulation=2))
    assert [step.number for step in steps] == [1, 2, 3, 4, 5]
    assert [step.epoch for step in steps] == [0.4, 0.8, 1.0, 1.5, 2.0]
    # The last step of the first epoch holds one micro-batch, and divides by its own tokens.
    assert steps[2].tokens == batch_of(8, 9).tokens
    assert (trainee.epoch, trainee.micro_batch, trainee.micro_batches_seen) == (2, 0, 9)
    assert steps[-1].loss < steps[0].loss


def test_a_step_is_taken_only_when_asked_for(trainee: Trainee, batch_of: BatchOf) -> None:
    steps = train(trainee, batches, lambda p: batch_of(*p), total_steps=5)
    assert trainee.step == 0
    next(steps)
    assert trainee.step == 1
    steps.close()
    rest = train(trainee, batches, lambda p: batch_of(*p), total_steps=5)
    assert [step.number for step in rest] == [2, 3, 4, 5]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_loop_after_its_step(
    trainee: Trainee, batch_of: BatchOf, number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def collated(places: tuple[int, ...]) -> Batch:
        if trainee.step == 2:
            os.kill(os.getpid(), number)
        return batch_of(*places)

    with StopRequest() as stop:
        steps = list(train(trainee, batches, collated, total_steps=50, accumulation=2, stop=stop))
        assert stop() == number.name
    assert [step.number for step in steps] == [1, 2, 3]
    assert trainee.progress()["step"] == 3
    assert signal.getsignal(number) is before


def test_the_second_signal_aborts_at_once(trainee: Trainee, batch_of: BatchOf) -> None:
    def collated(places: tuple[int, ...]) -> Batch:
        os.kill(os.getpid(), signal.SIGINT)
        return batch_of(*places)

    with pytest.raises(Aborted) as caught, StopRequest() as stop:
        list(train(trainee, batches, collated, total_steps=9, accumulation=2, stop=stop))
    assert caught.value.exit_code == 130
    assert trainee.step == 0


def test_stopping_without_a_signal(trainee: Trainee, batch_of: BatchOf) -> None:
    stop = StopRequest()
    steps = train(trainee, batches, lambda p: batch_of(*p), total_steps=9, stop=stop)
    taken = list(islice(steps, 2))
    stop.ask("early stopping")
    assert len(taken) == 2
    assert list(steps) == []
