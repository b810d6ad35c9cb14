"""A decoder layer as one function of autograd: to the bit what its parts give, and no more kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pennyweight.blocks import DecoderLayer, GatedFeedForward, RMSNorm, SelfAttention
from pennyweight.lora.layer import LoraFactors, LoraLinear
from pennyweight.quant import QuantizedLinear, quantize_4bit
from pennyweight.quant.kernels.cpu.library import chosen
from pennyweight.route import Route
from pennyweight.train import saved_bytes

HEAD, HEADS, SHARED, INSIDE, ROWS = 32, 4, 2, 96, 50
WIDTH = HEAD * HEADS
SHAPES = {
    "q_proj": (WIDTH, WIDTH),
    "k_proj": (HEAD * SHARED, WIDTH),
    "v_proj": (HEAD * SHARED, WIDTH),
    "o_proj": (WIDTH, WIDTH),
    "gate_proj": (INSIDE, WIDTH),
    "up_proj": (INSIDE, WIDTH),
    "down_proj": (WIDTH, INSIDE),
}


@pytest.fixture(autouse=True)
def compiled() -> None:
    if chosen() is None:
        pytest.skip("the kernels are not built")


def linear(name: str, route: Route, *, dense: bool, adapted: bool) -> nn.Module:
    d_out, d_in = SHAPES[name]
    base: nn.Module = QuantizedLinear(quantize_4bit(torch.randn(d_out, d_in) / d_in**0.5))
    if dense:
        base = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
    if not adapted:
        return base
    layer = LoraLinear(base, route, name)
    for adapter in "ab":
        factors = torch.randn(16, d_in) / 8, torch.randn(d_out, 16) / 8
        dropout = 0.5 if adapter == "b" else 0.0
        layer.put(adapter, LoraFactors(*factors, scaling=1.5, dropout=dropout))
    return layer


def whole(route: Route, *, targets: set[str], dense: bool = False) -> DecoderLayer:
    """A layer with adapters `a` and `b`, which drops, on those targets."""
    torch.manual_seed(0)
    made = {n: linear(n, route, dense=dense, adapted=n in targets) for n in SHAPES}
    attention = SelfAttention(
        {n: made[n] for n in list(SHAPES)[:4]},
        head_dim=HEAD,
        layer_idx=0,
        scaling=HEAD**-0.5,
        sliding_window=None,
        softcap=None,
        is_causal=True,
    )
    feed_forward = GatedFeedForward({n: made[n] for n in list(SHAPES)[4:]}, "silu")
    attention.pennyweight_route = feed_forward.pennyweight_route = route
    norms = [RMSNorm(nn.Parameter(torch.randn(WIDTH), requires_grad=False), 1e-5) for _ in range(2)]
    return DecoderLayer(norms[0], attention, norms[1], feed_forward)


def angles() -> tuple[Tensor, Tensor]:
    turned = torch.arange(ROWS)[:, None] / 100 ** (torch.arange(HEAD // 2) / HEAD)
    both = torch.cat([turned, turned], -1)[None]
    return both.cos(), both.sin()


def functions(y: Tensor) -> set[str]:
    """What autograd will run."""
    seen, waiting = set(), [y.grad_fn]
    while waiting:
        if (node := waiting.pop()) is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return {node.name() for node in seen}


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("of_x", [False, True])
@pytest.mark.parametrize("trained", ["a.lora", "a.lora_A"])
@pytest.mark.parametrize("targets", [set(SHAPES), {"q_proj", "v_proj", "down_proj"}, {"up_proj"}])
def test_whole_is_its_parts_to_the_bit(
    targets: set[str], trained: str, of_x: bool, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = Route()
    layer = whole(route, targets=targets, dense=dense)
    x, slope = torch.randn(1, ROWS, WIDTH, requires_grad=of_x), torch.randn(1, ROWS, WIDTH)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(f".{trained}" in name)
    wanted = [p for p in layer.parameters() if p.requires_grad] + ([x] if of_x else [])

    def taken() -> tuple[set[str], int, list[Tensor]]:
        def run() -> Tensor:
            y: Tensor = layer(x, position_embeddings=angles(), position_ids=None, use_cache=False)
            return y

        with route.over((0, 20, ROWS), ("a", "a")):
            y = run()  # first, for kernels are tried when they are first asked for
            kept = saved_bytes(run, besides=layer.parameters())
            grads = torch.autograd.grad(y, wanted, slope)
        return functions(y), kept, [y.detach(), *grads]

    names, kept, found = taken()
    monkeypatch.setattr(DecoderLayer, "_whole", lambda *_, **given: None)
    others, kept_apart, expected = taken()
    # Attention of which nothing is trained keeps nothing, part by part.
    assert ("_WholeBackward" in names) == (of_x or targets != {"up_proj"})
    assert "_WholeBackward" not in others
    # Where nobody asks for the input's gradient the parts do not keep the number a row of its norm.
    assert kept <= kept_apart + (0 if of_x else 4 * ROWS)
    assert len(found) == len(expected)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def _two_adapters(layer: DecoderLayer, route: Route) -> tuple[str, str]:
    return "a", "b"


def _softcap(layer: DecoderLayer, route: Route) -> tuple[str, str]:
    layer.self_attn.softcap = 30.0
    return "a", "a"


def _short_window(layer: DecoderLayer, route: Route) -> tuple[str, str]:
    layer.self_attn.sliding_window = 4
    return "a", "a"


def _trained_norm(layer: DecoderLayer, route: Route) -> tuple[str, str]:
    layer.input_layernorm.weight.requires_grad_()
    return "a", "a"


def _masked(layer: DecoderLayer, route: Route) -> tuple[str, str]:
    route.backend = "masked"
    return "a", "a"


def _watched(layer: DecoderLayer, route: Route) -> tuple[str, str]:
    layer.mlp.register_forward_hook(lambda *_: None)
    return "a", "a"


def _dropping(layer: DecoderLayer, route: Route) -> tuple[str, str]:
    route.dropout_seed = 1
    return "b", "b"


@pytest.mark.parametrize(
    "change",
    [_two_adapters, _softcap, _short_window, _trained_norm, _masked, _watched, _dropping],
)
def test_what_kernels_do_not_do_all_of_goes_by_parts(
    change: Callable[[DecoderLayer, Route], tuple[str, str]],
) -> None:
    route = Route()
    layer = whole(route, targets=set(SHAPES))
    x = torch.randn(1, ROWS, WIDTH, requires_grad=True)
    adapters = change(layer, route)
    with route.over((0, 20, ROWS), adapters, dropout_seed=route.dropout_seed):
        y = layer(x, position_embeddings=angles())
    assert "_WholeBackward" not in functions(y)
    assert y.isfinite().all()


def test_rows_that_do_not_lie_one_after_the_other_go_by_parts() -> None:
    route = Route()
    layer = whole(route, targets=set(SHAPES))
    x = torch.randn(1, WIDTH, ROWS).transpose(1, 2).requires_grad_()
    with route.over((0, 20, ROWS), ("a", "a")):
        apart = layer(x, position_embeddings=angles())
        together = layer(x.contiguous(), position_embeddings=angles())
    assert "_WholeBackward" not in functions(apart)
    assert "_WholeBackward" in functions(together)
    torch.testing.assert_close(apart, together)


@pytest.mark.parametrize("by_parts", [False, True])
def test_memory_is_of_the_rows_type_whatever_torchs_default_is(
    by_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_parts:
        monkeypatch.setattr(DecoderLayer, "_whole", lambda *_, **given: None)
    route = Route()
    layer = whole(route, targets=set(SHAPES))
    x = torch.randn(1, ROWS, WIDTH, requires_grad=True)
    turned = angles()

    def grad() -> Tensor:
        with route.over((0, 20, ROWS), ("a", "a")):
            y = layer(x, position_embeddings=turned)
        assert ("_WholeBackward" in functions(y)) != by_parts
        return torch.autograd.grad(y.square().sum(), x)[0]

    expected, usual = grad(), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)  # of half the bytes
        assert torch.equal(grad(), expected)
    finally:
        torch.set_default_dtype(usual)
