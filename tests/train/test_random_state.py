"""Every random state is put back: what is drawn after restoring is what would have been drawn.

Python's own generator is compared by its state: beartype draws from it whenever it looks into a
container, so under the tests every call moves it.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from pennyweight.train import random_tensors, restore_random


def disturb() -> list[float]:
    """Five draws; a normal one makes two and keeps the second waiting."""
    return [
        float(np.random.standard_normal()),  # noqa: NPY002
        np.random.random(),  # noqa: NPY002
        float(torch.rand(())),
        random.random(),
        random.gauss(0, 1),
    ]


@pytest.mark.parametrize("before", [0, 1, 2])
def test_every_state_is_put_back(before: int) -> None:
    for _ in range(before):
        disturb()
    kept = random_tensors()
    assert {"random/cpu", "random/python", "random/numpy"} <= kept.keys()
    expected = disturb()
    disturb()
    restore_random(kept)
    again = random_tensors()
    assert [name for name in kept if not torch.equal(kept[name], again[name])] == []
    assert disturb()[:3] == expected[:3]


def test_the_packed_state_is_pythons_own() -> None:
    random.gauss(0, 1)
    state = random.getstate()
    kept = random_tensors()
    random.seed(5)
    restore_random(kept)
    assert random.getstate() == state


def test_a_checkpoint_without_some_of_them_is_taken_as_it_is() -> None:
    kept = random_tensors()
    del kept["random/python"], kept["random/numpy"]
    restore_random(kept)
