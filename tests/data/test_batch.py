from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.data.batch import collate, efficiency, order
from pennyweight.data.conversation import Example


def example(length: int, *, trained: int, source: str = "a:1") -> Example:
    return Example(
        np.arange(length, dtype=np.int32), np.arange(length) >= length - trained, source, length
    )


def test_a_batch_is_documents_back_to_back() -> None:
    batch = collate([example(3, trained=2, source="a:1"), example(2, trained=2, source="a:2")])
    assert batch.ids.tolist() == [0, 1, 2, 0, 1]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1]
    assert batch.trained.tolist() == [False, True, True, True, True]
    assert (batch.boundaries, batch.adapters) == ((0, 3, 5), ("default", "default"))
    assert batch.sources == ("a:1", "a:2")
    assert (batch.ids.dtype, batch.positions.dtype) == (torch.int64, torch.int64)
    # A document's first token has no predictor, so the second document has one target, not two.
    assert (batch.tokens, batch.trained_tokens) == (5, 3)
    assert batch.to("cpu").boundaries == batch.boundaries


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 200), max_size=300),
    budget=st.integers(1, 150),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 100),
)
def test_packing_loses_no_row_and_splits_none(
    lengths: list[int], budget: int, seed: int, epoch: int
) -> None:
    batches = order(lengths, seed=seed, epoch=epoch, budget_tokens=budget, rows=None)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
    assert batches == order(lengths, seed=seed, epoch=epoch, budget_tokens=budget, rows=None)


@given(count=st.integers(0, 100), rows=st.integers(1, 9), seed=st.integers(0, 99))
def test_without_packing_each_batch_has_its_rows(count: int, rows: int, seed: int) -> None:
    batches = order([7] * count, seed=seed, epoch=0, budget_tokens=None, rows=rows)
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert all(len(batch) == rows for batch in batches[:-1])


def test_epochs_and_seeds_differ() -> None:
    lengths = [5] * 50
    seen = {
        tuple(order(lengths, seed=seed, epoch=epoch, budget_tokens=20, rows=None))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(seen) == 9


def test_the_order_never_changes() -> None:
    """Runs are resumed by recomputing the order; these numbers must hold for ever."""
    assert order([3] * 6, seed=1, epoch=2, budget_tokens=None, rows=3) == [
        (4, 1, 3),
        (5, 0, 2),
    ]
    assert order([5, 4, 3, 2, 1], seed=0, epoch=0, budget_tokens=6, rows=None) == [
        (0, 4),
        (2,),
        (1, 3),
    ]


def test_packing_wastes_little() -> None:
    lengths = (
        np.clip(np.random.default_rng(0).lognormal(5, 0.8, 20_000), 8, 1024).astype(int).tolist()
    )
    batches = order(lengths, seed=0, epoch=0, budget_tokens=2048, rows=None)
    assert efficiency(lengths, batches, 2048) > 0.98


def test_budget_and_rows_exclude_each_other() -> None:
    with pytest.raises(AssertionError):
        order([1], seed=0, epoch=0, budget_tokens=None, rows=None)
