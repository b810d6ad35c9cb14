"""An account of memory gives out what it has, and no more."""

from __future__ import annotations

from threading import Thread

import pytest

from pennyweight.budget import MemoryBudget
from pennyweight.errors import ConfigError


def test_what_is_reserved_fits_or_is_refused() -> None:
    budget = MemoryBudget(100)
    assert budget.reserve("keys and values", 60)
    assert not budget.reserve("training", 41)
    assert budget.free_bytes == 40, "a refusal takes nothing"
    assert budget.reserve("training", 40)
    budget.release("keys and values", 20)
    assert budget.held() == {"keys and values": 40, "training": 40}
    budget.release("keys and values", 40)
    assert budget.held() == {"training": 40}
    with pytest.raises(AssertionError):
        budget.release("keys and values", 1)


def test_a_floor_is_nobody_elses_and_what_one_waits_for_comes_to_it() -> None:
    budget = MemoryBudget(100, {"adapters": 10, "answers": 20})
    assert (budget.free_for("training"), budget.free_for("answers")) == (70, 90)
    assert (budget.sure_bytes("training"), budget.sure_bytes("answers")) == (70, 20)
    assert budget.reserve("answers", 80)  # beyond its floor while nobody minds
    assert not budget.reserve("training", 20)
    budget.waiting = "training"
    assert budget.is_beyond("answers")
    assert not budget.is_beyond("adapters")
    assert not budget.is_beyond("training")
    assert not budget.reserve("answers", 1)
    assert budget.reserve("adapters", 10)  # its floor is its own, whoever waits
    assert not budget.reserve("adapters", 1)
    budget.release("answers", 30)
    assert budget.reserve("training", 10)
    budget.release("answers", 40)
    assert not budget.is_beyond("answers")
    assert budget.reserve("answers", 10)
    assert not budget.reserve("answers", 1)
    budget.waiting = None
    budget.release("adapters", 10)
    assert budget.free_for("answers") == 60
    assert budget.free_for("training") == 60


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 bytes"):
        MemoryBudget(0)


def test_threads_that_ask_at_once_never_get_more_than_there_is() -> None:
    budget = MemoryBudget(1000)
    granted: list[bool] = []

    def ask() -> None:
        granted.extend(budget.reserve("rows", 3) for _ in range(100))

    threads = [Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(granted) == 333
    assert budget.free_bytes == 1
