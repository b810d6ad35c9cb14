"""The range test finds the best stable rate, on rows of its own, and leaves the base as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pennyweight.compare.arms import Arm, run_of
from pennyweight.compare.range_test import (
    RangeTest,
    best_rate,
    grid,
    set_apart,
    shortened,
    walked,
)
from pennyweight.config import RunConfig
from pennyweight.data.conversation import Example
from pennyweight.data.examples import Examples
from pennyweight.data.prepare import Prepared, prepare
from pennyweight.errors import DataError
from pennyweight.model import load_tokenizer


def point(rate: float, loss: float | None, *, noise: float = 0.0, stable: bool = True) -> Any:
    rng = np.random.default_rng(int(rate * 1e6))
    losses = (loss or 0) + noise * rng.standard_normal(40)
    told = {"learning_rate": rate, "loss": loss, "stable": stable}
    return told | {"document_losses": losses.tolist(), "document_counts": [1] * 40}


def test_the_grid_is_geometric() -> None:
    assert grid(1e-4, 1e-2, 5) == [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]


def test_the_best_is_the_lowest_that_is_stable() -> None:
    points = [point(1e-4, 3.0), point(1e-3, 2.0), point(1e-2, 1.0, stable=False)]
    assert best_rate(points) == 1
    assert best_rate([point(1e-4, None, stable=False)]) is None


def test_of_two_that_cannot_be_told_apart_the_smaller_is_taken() -> None:
    points = [point(1e-4, 3.0), point(1e-3, 2.01, noise=0.5), point(1e-2, 2.0, noise=0.5)]
    assert best_rate(points) == 1


def test_the_walk_goes_on_beyond_an_end_that_is_best() -> None:
    asked: list[float] = []

    def tried(rate: float) -> Mapping[str, Any]:
        asked.append(rate)
        return point(rate, abs(np.log10(rate) - np.log10(best)))

    best = 0.1
    assert best_rate(points := walked([1e-3, 1e-2], tried)) == 2
    assert asked == [1e-3, 1e-2, 0.1, 1.0]
    best = 1e-5
    points = walked([1e-3, 1e-2], tried)
    assert points[best_rate(points) or 0]["learning_rate"] == 1e-5
    best = 1e-12
    assert len(walked([1e-3, 1e-2], tried)) == 5  # it ends


def test_beyond_the_grid_rates_are_as_round_as_on_it() -> None:
    """Steps are counted from the grid's beginning: half a decade twice is a decade."""
    down = walked(grid(1e-3, 1e-2, 3), lambda rate: point(rate, rate))
    assert [each["learning_rate"] for each in down][:3] == [3.16e-5, 1e-4, 3.16e-4]
    up = walked(grid(1e-3, 1e-2, 3), lambda rate: point(rate, 1 / rate))
    assert [each["learning_rate"] for each in up][3:] == [3.16e-2, 1e-1, 3.16e-1]


def test_where_nothing_is_stable_smaller_rates_are_tried() -> None:
    points = walked([1e-2, 1e-1], lambda r: point(r, abs(np.log10(r) + 4), stable=r < 1e-3))
    assert points[best_rate(points) or 0]["learning_rate"] == 1e-4


def test_warm_up_keeps_its_share() -> None:
    config = RunConfig.model_validate({"train": {"max_steps": 400, "warmup_steps": 20}})
    assert shortened(config, 40).train.warmup_steps == 2
    assert shortened(RunConfig(), 1).train.warmup_steps == 0


def example(question: int, answer: int) -> Example:
    ids = np.array([1, question, question, answer], dtype=np.int32)
    return Example(ids, np.array([False, False, False, True]), f"rows:{question}:{answer}", 4)


def test_a_question_is_on_one_side_only() -> None:
    train = Examples.of([example(q, a) for q in range(20) for a in range(3)])
    apart, rest = set_apart(train, 10)
    questions = [{int(e.ids[1]) for e in side} for side in (apart, rest)]
    assert not questions[0] & questions[1]
    assert 10 <= len(apart) <= 12
    assert len(apart) + len(rest) == 60
    assert len(set_apart(train, 10_000)[0]) <= 15  # a fifth, to a question


def test_one_question_for_all_is_set_apart_by_row_and_one_row_not_at_all() -> None:
    apart, rest = set_apart(Examples.of([example(7, a) for a in range(30)]), 5)
    assert (len(apart), len(rest)) == (5, 25)
    with pytest.raises(DataError, match=r"compare\.learning_rates"):
        set_apart(Examples.of([example(1, 1)]), 5)


@pytest.fixture
def prepared(description: Any, tmp_path: Path) -> Any:

    def make(arm: Arm) -> tuple[RunConfig, Prepared]:
        run = run_of(
            description(tmp_path), arm, seed=0, learning_rate=1e-3, output_dir=str(tmp_path)
        )
        tokenizer = load_tokenizer(run.base.model)
        return shortened(run, 3), prepare(run.data, tokenizer, seed=0)

    return make


@pytest.mark.parametrize("arm", [Arm("full", None), Arm("qlora", 4)])
def test_each_rate_starts_afresh_and_the_held_out_rows_are_not_read(
    prepared: Any, arm: Arm
) -> None:
    config, data = prepared(arm)
    test = RangeTest(config, data.train, 8, recompute="none")
    seen = set(test.judged.sources) | set(test.rest.sources)
    assert not seen & set(data.eval.sources)
    first, again = test.tried(1e-2), test.tried(1e-2)
    assert first == again
    assert first["stable"]
    assert first["loss"] < test.before.loss
    assert test._report(None).loss == test.before.loss


def test_a_rate_that_blows_up_is_not_stable(prepared: Any) -> None:
    config, data = prepared(Arm("lora", 4))
    wild = {"max_grad_norm": None, "adam_epsilon": 1e-8, "lr_scheduler_type": "constant"}
    config = config.model_copy(update={"train": config.train.model_copy(update=wild)})
    test = RangeTest(config, data.train, 8, recompute="none")
    told = test.tried(1e4)
    assert not told["stable"]
    assert told["why"]
