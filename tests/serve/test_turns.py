"""Turns: tokens in the ratio of weights while there is work, and nobody is kept waiting for long."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.serve.turns import QUANTUM_TOKENS, Turns


@dataclass(eq=False)
class Lane:
    weight: float
    cost: int
    busy: bool = True


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.5, 1.0, 2.0, 4.0]), st.integers(1, 2000)),
        min_size=2,
        max_size=6,
    )
)
def test_tokens_stand_in_the_ratio_of_weights(shapes: list[tuple[float, int]]) -> None:
    lanes = [Lane(weight, cost) for weight, cost in shapes]
    turns, used = Turns(), Counter[int]()
    for _ in range(400):
        lane = turns.next(lanes)
        assert lane is not None
        turns.charge(lane, lane.cost)
        used[lanes.index(lane)] += lane.cost
    for i, a in enumerate(lanes):
        for j, b in enumerate(lanes):
            apart = abs(used[i] / a.weight - used[j] / b.weight)
            bound = a.cost / a.weight + b.cost / b.weight + 2 * QUANTUM_TOKENS
            assert apart <= bound


def test_a_lane_without_work_saves_nothing_up_and_is_served_at_once() -> None:
    chat, job = Lane(1, 1, busy=False), Lane(1, 1000)
    turns = Turns()
    for _ in range(50):
        assert turns.next([chat, job]) is job
        turns.charge(job, job.cost)
    chat.busy = True
    assert turns.next([chat, job]) is chat
    served = []
    for _ in range(3000):
        lane = turns.next([chat, job])
        assert lane is not None
        turns.charge(lane, lane.cost)
        served.append(lane)
    # One micro-batch for each thousand tokens said, not the fifty that were not missed.
    assert 1 <= served.count(job) <= 4


def test_nobody_has_work() -> None:
    assert Turns().next([Lane(1, 1, busy=False)]) is None
    assert Turns().next([]) is None
