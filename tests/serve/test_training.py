"""A job's lane: what it tells of each beat of a run, and when it lets a checkpoint be kept."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest

from pennyweight.config import LoraConfig
from pennyweight.finetune import Beat
from pennyweight.lora import Adapter, attach, detach
from pennyweight.model import BaseModel
from pennyweight.serve.jobs.training import Ending, JobLane
from pennyweight.train import Step


def step(number: int) -> Beat:
    taken = Step(number, 1.0, 3, 4, 1e-3, 1.0, 0.1, 0.5)
    return Beat("stepped", step=taken)


@pytest.fixture
def config(small_base: BaseModel) -> Iterator[LoraConfig]:
    made = LoraConfig(r=2, target_modules=("q_proj",))
    attach(small_base, made, name="lane", seed=0)
    yield made
    detach(small_base, "lane")


def test_every_checkpoint_is_kept_the_one_resumed_with_too_and_none_outruns_the_clerk(
    small_base: BaseModel, config: LoraConfig
) -> None:
    """Killed at any instant, at most the newest checkpoint is not kept, and that one is resumed with."""
    beats = [Beat("prepared"), Beat("saved"), Beat("resumed"), Beat("micro_batch", 4, 3), step(5)]
    beats += [Beat("saved"), Beat("micro_batch", 4, 3), step(6), Beat("saved")]
    kept: list[tuple[int, Future[None]]] = []
    told: list[tuple[str, bool]] = []
    ended: list[Ending] = []

    def run(*_: Any) -> Any:
        yield from beats

    def keep(number: int, adapter: Adapter) -> Future[None]:
        assert adapter.factors
        kept.append((number, Future()))
        threading.Timer(0.05, kept[-1][1].set_result, (None,)).start()
        return kept[-1][1]

    lane = JobLane(
        run,
        small_base,
        config,
        name="lane",
        weight=1.0,
        told=lambda mark, _: told.append((mark, kept[-1][1].done())),
        saved=keep,
        ended=ended.append,
        step_now=lambda: 4,
    )
    while lane.busy:
        lane.work()
    assert [number for number, _ in kept] == [4, 5, 6]
    # A step is told of once the checkpoint before it is kept.
    assert told == [("step 5", True), ("step 6", True)]
    assert ended == [None]
