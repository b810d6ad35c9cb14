"""Figures against hand arithmetic, and intervals that answer the question they are named for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pennyweight.compare.tally import answered, forgotten, kept, loss, over_seeds

COUNTS = [4, 6, 10]


def documents(per_token: float, counts: list[int] = COUNTS) -> dict[str, Any]:
    return {"losses": [per_token * count for count in counts], "counts": counts}


def test_sums_are_divided_once() -> None:
    uneven = {"losses": [8.0, 6.0, 5.0], "counts": COUNTS}
    figure = loss([uneven, documents(2.0)])
    assert figure.by_seed == pytest.approx((19 / 20, 2.0))
    assert figure.mean == pytest.approx((19 + 40) / 40)


def test_documents_that_are_alike_leave_no_doubt_and_seeds_that_differ_do() -> None:
    figure = loss([documents(1.0), documents(2.0), documents(3.0)])
    assert figure.documents == pytest.approx((2.0, 2.0))
    assert figure.seeds == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4)
    assert loss([documents(1.0)]).seeds is None


def test_kept_is_the_share_of_what_full_fine_tuning_gained() -> None:
    arm = {0: documents(2.0), 1: documents(1.5)}
    figure = kept(documents(4.0), arm, {0: documents(1.0), 1: documents(1.0), 2: documents(9.0)})
    assert figure is not None
    assert figure.by_seed == pytest.approx((2 / 3, 2.5 / 3))
    assert figure.mean == pytest.approx(4.5 / 6)
    assert figure.documents == pytest.approx((4.5 / 6, 4.5 / 6))


def test_nothing_is_kept_of_no_gain() -> None:
    assert kept(documents(4.0), {0: documents(3.0)}, {}) is None
    assert kept(documents(4.0), {0: documents(3.0)}, {0: documents(4.1)}) is None
    noise = {"losses": [16.0 - 8, 24 + 8, 40], "counts": COUNTS}
    assert kept(documents(4.0), {0: documents(3.0)}, {0: noise}) is None


def test_what_is_hard_for_both_cancels() -> None:
    """Documents differ by far more than the change; paired, the change is certain all the same."""
    rng = np.random.default_rng(0)
    hard = rng.uniform(1, 9, 50)
    before = {"losses": hard.tolist(), "counts": [1] * 50}
    after = [{"losses": (hard + 0.1).tolist(), "counts": [1] * 50}]
    figure = forgotten(before, after)
    assert figure.mean == pytest.approx(0.1)
    assert figure.documents == pytest.approx((0.1, 0.1))


def test_answers_are_shares() -> None:
    figure = answered([{"right": [1.0, 0.0, 1.0, 1.0]}, {"right": [1.0, 0.0, 0.0, 1.0]}])
    assert figure is not None
    assert figure.by_seed == (0.75, 0.5)
    assert figure.mean == 0.625
    assert answered([None, None]) is None
    none_right = answered([{"right": [0.0] * 60}, {"right": [0.0] * 60}])
    assert none_right is not None
    assert none_right.documents == pytest.approx((0, 0.0602), abs=1e-4)  # Wilson, 0 of 60
    assert over_seeds([1.0, 3.0]).mean == 2
