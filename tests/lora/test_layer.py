"""The one formula, its gradients and its dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pennyweight.lora.layer import LoraFactors, LoraLinear, lora_delta, stable_seed
from pennyweight.route import Route


def test_delta_is_the_formula_in_float64():
    x, a, b = torch.randn(3, 5, 7).double(), torch.randn(2, 7).double(), torch.randn(4, 2).double()
    torch.testing.assert_close(lora_delta(x, a, b, scaling=0.5), 0.5 * x @ a.T @ b.T)


def test_fresh_factors_start_at_nothing_and_within_the_kaiming_bound():
    made = LoraFactors.fresh(
        4096, 4096, 8, scaling=2.0, dropout=0.0, seed=3, device=torch.device("cpu")
    )
    assert not made.lora_B.any()
    assert made.lora_A.abs().max() <= 1 / math.sqrt(4096)
    assert float(made.lora_A.detach().std()) == pytest.approx(1 / math.sqrt(3 * 4096), rel=0.02)
    assert made.lora_A.numel() + made.lora_B.numel() == 65_536


def test_dropout_is_a_function_of_its_seed_and_keeps_the_mean():
    x, a, b = torch.ones(1, 4000, 16), torch.eye(16), torch.eye(16)
    once = lora_delta(x, a, b, scaling=1.0, dropout=0.25, seed=7)
    again = lora_delta(x, a, b, scaling=1.0, dropout=0.25, seed=7)
    other = lora_delta(x, a, b, scaling=1.0, dropout=0.25, seed=8)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert once.mean() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(lora_delta(x, a, b, scaling=1.0, dropout=0.25), x)


def test_documents_read_their_own_adapters():
    route, base = Route(), nn.Linear(6, 5)
    layer = LoraLinear(base, route, "some.layer")
    for name in ("x", "y.2"):
        factors = LoraFactors(torch.randn(2, 6), torch.randn(5, 2), scaling=1.5, dropout=0.0)
        layer.put(name, factors)
    row = torch.randn(1, 9, 6)
    with route.over((0, 2, 5, 7, 9), ("x", "y.2", None, "x")):
        mixed = layer(row)
    for start, stop, name in ((0, 2, "x"), (2, 5, "y.2"), (5, 7, None), (7, 9, "x")):
        with route.over((0, stop - start), (name,)):
            torch.testing.assert_close(mixed[:, start:stop], layer(row[:, start:stop]))


def test_seeds_are_stable_across_processes_and_machines():
    assert stable_seed(0, "model.layers.0.q_proj") == 1663825646913858921
    assert stable_seed(0, "a", "b") != stable_seed(0, "ab")
