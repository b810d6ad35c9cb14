"""Who loses a place is told by held-out loss at equal counts, and by nothing else."""

from __future__ import annotations

from pennyweight.config import AdaptersConfig
from pennyweight.sweep.losers import losers, next_rung


def rungs(settings: AdaptersConfig) -> list[int | None]:
    found: list[int | None] = []
    passed: int | None = 0
    while passed is not None and len(found) < 4:
        passed = next_rung(settings, passed)
        found.append(passed)
    return found


def test_rungs() -> None:
    assert rungs(AdaptersConfig()) == [None]
    assert rungs(AdaptersConfig(stop="halving", stop_after=3)) == [3, 6, 12, 24]
    assert rungs(AdaptersConfig(stop="margin", stop_after=3)) == [3, 4, 5, 6]


def test_halving_keeps_the_better_half_and_only_counts_what_all_have() -> None:
    settings = AdaptersConfig(stop="halving")
    losses = {"a": [3.0, 2.0, 0.1], "b": [2.5, 1.5], "c": [9.0, 1.0], "d": [4.0, 4.0]}
    assert set(losers(settings, losses, 2)) == {"a", "d"}
    assert set(losers(settings, {"a": [1.0], "b": [1.0], "c": [1.0]}, 1)) == {"c"}
    assert losers(settings, {"a": [1.0]}, 1) == {}


def test_a_margin_stops_whoever_is_that_much_worse_than_the_best() -> None:
    settings = AdaptersConfig(stop="margin", stop_margin=0.5)
    found = losers(settings, {"a": [2.0, 1.0], "b": [1.6, 1.6], "c": [1.4, 1.45]}, 2)
    assert found == {"b": "1.6000 after 2 evaluations, a 1.0000"}
