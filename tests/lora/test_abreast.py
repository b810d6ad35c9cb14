"""Layers that read the same rows in one call: as near to float64 as one by one, and who goes apart."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from pennyweight.blocks import GatedFeedForward
from pennyweight.lora.abreast import abreast, along_of
from pennyweight.lora.layer import LoraFactors, LoraLinear
from pennyweight.quant import QuantizedLinear, quantize_4bit
from pennyweight.quant.kernels.cpu.library import chosen
from pennyweight.route import Route
from pennyweight.train import saved_bytes

WIDTH, INSIDE, ROWS = 64, 96, 50


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kernels, found = chosen(), cast(torch.dtype, request.param)
    if kernels is None or (found == torch.bfloat16 and kernels.adapted_bf16 is None):
        pytest.skip("this processor has no products of bf16, or the kernels are not built")
    return found


def layer(
    d_in: int, d_out: int, route: Route, *, dense: torch.dtype | None = None, rank: int | None
) -> nn.Module:
    """Frozen, with adapters `a` and `b` of that rank, if any."""
    base: nn.Module = QuantizedLinear(quantize_4bit(torch.randn(d_out, d_in) / d_in**0.5))
    if dense is not None:
        base = nn.Linear(d_in, d_out, dtype=dense).requires_grad_(False)
    if rank is None:
        return base
    adapted = LoraLinear(base, route, "some.layer")
    for name in "ab":
        factors = torch.randn(rank, d_in) / 8, torch.randn(d_out, rank) / 8
        adapted.put(name, LoraFactors(*factors, scaling=1.5, dropout=0.5 if name == "b" else 0.0))
    return adapted


def apart(one: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """In float64, of the same stored numbers."""
    base = one.base_layer if isinstance(one, LoraLinear) else one
    quantized = isinstance(base, QuantizedLinear)
    weight = base.dequantize(dtype) if quantized else base.weight
    y = x @ weight.double().T
    if base.bias is not None:
        y = y + base.bias.double()
    if isinstance(one, LoraLinear):
        own = one.of("a")
        y = y + 1.5 * (x @ own.lora_A.double().T) @ own.lora_B.double().T
    return y


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    share = 0.015 if dtype == torch.bfloat16 else 1e-6
    return bool((ours.detach().double() - exact.detach().double()).norm() <= share * exact.norm())


def whole(rank: int | None, dtype: torch.dtype) -> int | None:
    """Such a rank as products in this type take: in float32 whole vectors."""
    return rank if rank is None or dtype == torch.bfloat16 else 16 * rank


@pytest.mark.parametrize("rows", [ROWS, 250])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("drawn", [(4, 16, 2), (None, 8, None)])
def test_layers_abreast_are_their_formulas(
    drawn: tuple[int | None, ...], dense: bool, rows: int, dtype: torch.dtype
) -> None:
    route, ranks = Route(), [whole(rank, dtype) for rank in drawn]
    sizes = zip((64, 32, 96), ranks, strict=True)
    layers = [layer(WIDTH, n, route, dense=dtype if dense else None, rank=r) for n, r in sizes]
    x = torch.randn(1, rows, WIDTH, dtype=dtype, requires_grad=True)
    readouts = [torch.randn(1, rows, n, dtype=dtype) for n in (64, 32, 96)]
    wide = x.detach().double().requires_grad_()
    trained = [p for one in layers for k, p in one.named_parameters() if ".a." in k]
    with route.over((0, rows), ("a",)):
        taken = along_of(layers, x)
        ys = abreast(layers, x)
        held = [p for one in layers for p in one.parameters()]
        kept = saved_bytes(lambda: abreast(layers, x), besides=held)
    assert taken is not None
    assert kept == dtype.itemsize * rows * (WIDTH + sum(r or 0 for r in ranks))
    exact = [apart(one, wide, dtype) for one in layers]
    ours = torch.autograd.grad(
        sum((y * r).sum() for y, r in zip(ys, readouts, strict=True)), [x, *trained]
    )
    slopes = torch.autograd.grad(
        sum((y * r).sum() for y, r in zip(exact, readouts, strict=True)), [wide, *trained]
    )
    for one, two in zip((*ys, *ours), (*exact, *slopes), strict=True):
        assert close(one, two, dtype)


def test_who_does_not_fit_goes_apart(dtype: torch.dtype) -> None:
    """Two adapters in the row, dropout, a rank that is not whole, float16, and passes whose gradients
    nobody wants."""
    route = Route()
    layers = [layer(WIDTH, 32, route, rank=whole(4, dtype)) for _ in range(2)]
    x = torch.randn(1, ROWS, WIDTH, dtype=dtype)
    with route.over((0, 20, ROWS), ("a", None)):
        assert along_of(layers, x) is None
        mixed = abreast(layers, x)
        assert all(torch.equal(y, one(x)) for y, one in zip(mixed, layers, strict=True))
    with route.over((0, ROWS), ("b",), dropout_seed=1):
        assert along_of(layers, x) is None
    with route.over((0, ROWS), ("a",)):
        assert along_of(layers, x) is not None
        assert along_of(layers, x.half()) is None
        assert along_of([*layers, layer(WIDTH, 32, route, rank=3)], x) is None
        with torch.no_grad():
            assert along_of(layers, x) is None


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("drawn", [(4, 4, 8), (None, 6, None), (None, None, 2)])
def test_a_feed_forward_along_is_its_formula(
    drawn: tuple[int | None, ...], activation: str, dtype: torch.dtype
) -> None:
    route, ranks = Route(), [whole(rank, dtype) for rank in drawn]
    shapes = {
        "gate_proj": (WIDTH, INSIDE),
        "up_proj": (WIDTH, INSIDE),
        "down_proj": (INSIDE, WIDTH),
    }
    layers = {
        name: layer(*shape, route, rank=r)
        for (name, shape), r in zip(shapes.items(), ranks, strict=True)
    }
    block = GatedFeedForward(layers, activation)
    block.pennyweight_route = route
    x = torch.randn(1, ROWS, WIDTH, dtype=dtype, requires_grad=True)
    readout = torch.randn(1, ROWS, WIDTH, dtype=dtype)
    wide = x.detach().double().requires_grad_()
    trained = [p for k, p in block.named_parameters() if ".a." in k]
    gate, up, down = layers.values()
    inside = getattr(nn.functional, activation)(apart(gate, wide, dtype)) * apart(up, wide, dtype)
    exact = apart(down, inside, dtype)
    slopes = torch.autograd.grad((exact * readout).sum(), [wide, *trained])
    with route.over((0, ROWS), ("a",)):
        y = block(x)
        ours = torch.autograd.grad((y * readout).sum(), [x, *trained])
        kept = saved_bytes(lambda: block(x), besides=block.parameters())
        route.recomputing = True
        again = block(x)
        route.recomputing = False
        recomputed = torch.autograd.grad((again * readout).sum(), [x, *trained])
    assert kept == dtype.itemsize * ROWS * (WIDTH + 2 * INSIDE + sum(r or 0 for r in ranks))
    assert not again.any()
    assert all(map(torch.equal, ours, recomputed))
    for one, two in zip((y, *ours), (exact, *slopes), strict=True):
        assert close(one, two, dtype)
