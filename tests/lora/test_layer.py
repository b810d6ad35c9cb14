"""The one formula, its gradients and its dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pennyweight.lora.layer import LoraFactors, LoraLinear, lora_delta, stable_seed
from pennyweight.quant import QuantizedLinear, quantize_4bit
from pennyweight.route import Route
from pennyweight.train import saved_bytes


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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_autograds_of_the_formula(dropout: float) -> None:
    route = Route()
    layer = LoraLinear(nn.Linear(6, 5).requires_grad_(False), route, "some.layer").double()
    for name in ("x", "y"):
        factors = torch.randn(2, 6).double(), torch.randn(5, 2).double()
        layer.put(name, LoraFactors(*factors, scaling=1.5, dropout=dropout))
    row = torch.randn(1, 9, 6).double().requires_grad_(True)
    readout = torch.randn(1, 9, 5).double()
    trained = [row, *(p for p in layer.parameters() if p.requires_grad)]
    seed = stable_seed(4, "some.layer")

    def formula() -> torch.Tensor:
        parts = [layer.base_layer(row)]
        for name, rows in (("x", slice(0, 4)), ("y", slice(5, 9))):
            own = layer.of(name)
            part = torch.zeros(1, 9, 5).double()
            part[:, rows] = lora_delta(
                row[:, rows], own.lora_A, own.lora_B, scaling=1.5, dropout=dropout, seed=seed
            )
            parts.append(part)
        return sum(parts)

    with route.over((0, 4, 5, 9), ("x", None, "y"), dropout_seed=4):
        ours = torch.autograd.grad((layer(row) * readout).sum(), trained)
        torch.testing.assert_close(layer(row), formula())
    for one, two in zip(
        ours, torch.autograd.grad((formula() * readout).sum(), trained), strict=True
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", [3, 16])
@pytest.mark.parametrize("dense", [False, True])
def test_in_bf16_results_are_as_near_to_float64_as_roundings(
    dense: bool, rank: int, dropout: float
) -> None:
    """One adapter over all rows, which a product of bf16 may take along, and one over some of them."""
    route = Route()
    base: nn.Module
    base = QuantizedLinear(quantize_4bit(torch.randn(96, 64) / 8), torch.randn(96).bfloat16())
    weight, bias = base.dequantize(torch.bfloat16).double(), base.bias.double()
    if dense:
        base = nn.Linear(64, 96, dtype=torch.bfloat16).requires_grad_(False)
        weight, bias = base.weight.double(), base.bias.double()
    layer = LoraLinear(base, route, "some.layer")
    factors = torch.randn(rank, 64) / 8, torch.randn(96, rank) / 4
    layer.put("x", LoraFactors(*factors, scaling=1.5, dropout=dropout))
    x = torch.randn(1, 50, 64).bfloat16().requires_grad_()
    readout = torch.randn(1, 50, 96).bfloat16()
    masters = [p for p in layer.parameters() if p.requires_grad]
    a, b = (p.detach().double().requires_grad_() for p in masters)
    exact = x.detach().double().requires_grad_()
    seed = stable_seed(4, "some.layer")
    for bounds, names in (((0, 50), ("x",)), ((0, 20, 50), ("x", None))):
        stop = bounds[1]
        added = lora_delta(exact[:, :stop], a, b, scaling=1.5, dropout=dropout, seed=seed)
        wanted = exact @ weight.T + bias
        wanted = wanted + nn.functional.pad(added, (0, 0, 0, 50 - stop))
        slopes = torch.autograd.grad((wanted * readout).sum(), (exact, a, b))
        with route.over(bounds, names, dropout_seed=4):
            ours = layer(x)
            found = torch.autograd.grad((ours * readout).sum(), (x, *masters))
        for one, two in zip((ours, *found), (wanted, *slopes), strict=True):
            assert (one.double() - two).norm() <= 0.01 * two.norm()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_read_one_tensor_keep_it_once(dropout: float) -> None:
    route = Route()
    layers = [LoraLinear(nn.Linear(64, 32).requires_grad_(False), route, n) for n in "qkv"]
    for layer in layers:
        layer.put(
            "a", LoraFactors(torch.randn(2, 64), torch.randn(32, 2), scaling=1, dropout=dropout)
        )
    held = [p for layer in layers for p in layer.parameters()]
    x = torch.randn(1, 50, 64)
    with route.over((0, 50), ("a",), dropout_seed=1):
        kept = saved_bytes(lambda: [layer(x) for layer in layers], besides=held)
    assert kept == 4 * 50 * (64 + 3 * 2)


def test_a_frozen_adapter_lets_the_gradient_through() -> None:
    route = Route()
    layer = LoraLinear(nn.Linear(6, 5), route, "some.layer").requires_grad_(False)
    layer.put("a", LoraFactors(torch.randn(2, 6), torch.randn(5, 2), scaling=1.0, dropout=0.0))
    layer.requires_grad_(False)
    x = torch.randn(1, 4, 6, requires_grad=True)
    with route.over((0, 4), ("a",)):
        layer(x).sum().backward()
    own = layer.of("a")
    whole = layer.weight + own.lora_B @ own.lora_A
    torch.testing.assert_close(x.grad, whole.sum(0).expand(1, 4, 6))
    assert own.lora_A.grad is None


def test_seeds_are_stable_across_processes_and_machines():
    assert stable_seed(0, "model.layers.0.q_proj") == 1663825646913858921
    assert stable_seed(0, "a", "b") != stable_seed(0, "ab")


def test_without_gradients_the_bits_are_those_of_training() -> None:
    layer = LoraLinear(nn.Linear(6, 5), Route(), "some.layer")
    for name in ("x", "y"):
        factors = LoraFactors(torch.randn(2, 6), torch.randn(5, 2), scaling=1.5, dropout=0.0)
        layer.put(name, factors)
    row = torch.randn(1, 9, 6)
    for names in (("x", "x", "x"), ("x", None, "y")):
        with layer.route.over((0, 2, 5, 9), names):
            trained = layer(row)
            with torch.no_grad():
                assert torch.equal(layer(row), trained)
