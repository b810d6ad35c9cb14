"""A short pass over many adapters at once: each token as by its own adapter alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from pennyweight.lora.layer import LoraFactors, LoraLinear
from pennyweight.route import Route

RANKS = {"a": 2, "b": 5, "c.2": 1}


def layer_of(**ranks: int) -> LoraLinear:
    layer = LoraLinear(nn.Linear(6, 7), Route(), "some.layer")
    for name, r in (ranks or RANKS).items():
        factors = LoraFactors(torch.randn(r, 6), torch.randn(7, r), scaling=1.5, dropout=0.0)
        layer.put(name, factors.requires_grad_(False))
    return layer


def passed(layer: LoraLinear, row: torch.Tensor, counts: list[int], names: list[str | None]):
    """The row through the layer as generation does it, and segment by segment as training does."""
    boundaries = [sum(counts[:at]) for at in range(len(counts) + 1)]
    with layer.route.over(boundaries, names):
        with torch.inference_mode():
            at_once = layer(row)
        with torch.no_grad():
            return at_once, layer(row)


@pytest.mark.parametrize(
    ("counts", "names"),
    [
        ([1], ["a"]),
        ([1, 1, 1], ["a", "b", "c.2"]),
        ([2, 1, 1, 3], [None, "a", "b", "c.2"]),
        ([1, 1, 1, 1], ["c.2", "a", "c.2", "b"]),
        ([5, 2], ["b", "a"]),
        ([1, 1], ["a", "nobody"]),
        ([1, 1], ["nobody", "nobody"]),
        ([2, 1, 2], ["a", None, "b"]),
    ],
)
def test_at_once_is_one_by_one(counts: list[int], names: list[str | None]) -> None:
    layer = layer_of()
    row = torch.randn(1, sum(counts), 6)
    at_once, by_segments = passed(layer, row, counts, names)
    torch.testing.assert_close(at_once, by_segments, rtol=1e-6, atol=1e-6)


def test_in_bf16_the_stack_multiplies_in_float32_where_a_cpu_does() -> None:
    layer = layer_of().bfloat16()
    exact = layer_of(a=1)  # for its base layer
    exact.base_layer.load_state_dict(layer.base_layer.state_dict())
    for name in RANKS:
        kept = {key: t.detach().bfloat16().float() for key, t in layer.of(name).named_parameters()}
        made = LoraFactors(kept["lora_A"], kept["lora_B"], scaling=1.5, dropout=0.0)
        exact.put(name, made.requires_grad_(False))
    row = torch.randn(1, 5, 6).bfloat16()
    for counts, names in (([2, 2], ["a", "b"]), ([1, 1, 3], ["c.2", "a", "b"])):
        given = row[:, : sum(counts)]
        at_once, _ = passed(layer, given, counts, names)
        wanted, _ = passed(exact, given.float(), counts, names)
        assert at_once.dtype == torch.bfloat16
        # Rounded after the base's product and after the sum, and nowhere between.
        bound = 2**-7 * (1.0 + float(wanted.abs().max()))
        torch.testing.assert_close(at_once.float(), wanted, rtol=0.0, atol=bound)


def test_a_factor_that_changed_is_read_anew() -> None:
    layer, row = layer_of(), torch.randn(1, 2, 6)
    factors = layer.of("b")
    assert isinstance(factors, LoraFactors)

    def agrees() -> torch.Tensor:
        at_once, by_segments = passed(layer, row, [1, 1], ["a", "b"])
        torch.testing.assert_close(at_once, by_segments, rtol=1e-6, atol=1e-6)
        return at_once

    seen = [agrees()]
    assert layer._stack is not None
    kept = layer._stack
    agrees()
    assert layer._stack is kept, "nothing changed, nothing is stacked again"
    with torch.no_grad():
        factors.lora_B.mul_(2.0)
    seen.append(agrees())
    factors.lora_A.data = torch.randn(5, 6)
    seen.append(agrees())
    factors.lora_A = nn.Parameter(torch.randn(5, 6), requires_grad=False)
    seen.append(agrees())
    layer.drop("b")
    seen.append(agrees())
    layer.put("b", LoraFactors(torch.randn(3, 6), torch.randn(7, 3), scaling=1.0, dropout=0.0))
    seen.append(agrees())
    for before, after in itertools.pairwise(seen):
        assert not torch.equal(before[:, 1], after[:, 1])
        torch.testing.assert_close(before[:, 0], after[:, 0])


def test_alone_again_it_is_the_same_to_the_bit() -> None:
    """What is stacked beside an adapter for passes in company has no part in its own."""
    width = 512
    layer = LoraLinear(nn.Linear(width, width), Route(), "some.layer")
    for name, r in {"a": 3, "b": 61}.items():
        factors = LoraFactors(
            torch.randn(r, width), torch.randn(width, r), scaling=1.5, dropout=0.0
        )
        layer.put(name, factors.requires_grad_(False))
    rows = [torch.randn(1, tokens, width) for tokens in (1, 2, 5)]
    alone = [passed(layer, row, [row.shape[1]], ["a"])[0] for row in rows]
    passed(layer, torch.randn(1, 2, width), [1, 1], ["a", "b"])
    for row, before in zip(rows, alone, strict=True):
        assert torch.equal(passed(layer, row, [row.shape[1]], ["a"])[0], before)


def test_what_is_not_finite_stays_in_its_own_rows() -> None:
    layer, row = layer_of(), torch.randn(1, 6, 6)
    names = ["a", "b", "b", "b", "c.2", "a"]
    clean, _ = passed(layer, row, [1] * 6, names)
    with torch.no_grad():
        layer.of("b").lora_A.fill_(float("nan"))  # type: ignore[union-attr, operator]
    found, _ = passed(layer, row, [1] * 6, names)
    assert torch.isnan(found[0, 1:4]).all()
    assert torch.equal(found[0, [0, 4, 5]], clean[0, [0, 4, 5]])


def test_training_never_goes_at_once() -> None:
    layer, row = layer_of(), torch.randn(1, 2, 6)
    with layer.route.over([0, 1, 2], ["a", "b"], dropout_seed=3):
        layer(row)
        with torch.inference_mode():
            layer(row)
    assert layer._stack is layer._lone is None
