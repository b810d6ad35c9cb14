"""Our norms, attention and feed-forwards against the model's own: values, gradients, and what they keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pennyweight.blocks import GatedFeedForward, RMSNorm, SelfAttention
from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.lora import attach
from pennyweight.lora.layer import LoraFactors, LoraLinear
from pennyweight.model import BaseModel, load_base
from pennyweight.route import Route
from pennyweight.train import saved_bytes

ROWS, WIDTH, INSIDE, RANK = 12, 16, 40, 3


def plain_norm(x: Tensor, weight: Tensor, eps: float, wide_weight: bool) -> Tensor:
    n = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (n * (1 + weight.float())).to(x.dtype) if wide_weight else weight * n.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide_weight", [False, True])
def test_a_frozen_norm_is_its_formula_and_keeps_its_input(
    wide_weight: bool, dtype: torch.dtype
) -> None:
    weight = nn.Parameter(torch.randn(WIDTH, dtype=dtype), requires_grad=False)
    norm = RMSNorm(weight, 1e-5, wide_weight=wide_weight)
    x = torch.randn(1, ROWS, WIDTH, dtype=dtype, requires_grad=True)
    readout = torch.randn(1, ROWS, WIDTH)
    expected = plain_norm(x, weight, 1e-5, wide_weight)
    # A kernel sums squares in another order: the last place, in bf16 rarely.
    room = 2e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(norm(x), expected, rtol=room, atol=1e-6)
    assert torch.equal(norm(x.detach()), norm(x))
    (slope,) = torch.autograd.grad((norm(x).float() * readout).sum(), x)
    exact = x.detach().double().requires_grad_(True)
    n = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    scaled = n * (weight.double() + 1.0 if wide_weight else weight.double())
    (wanted,) = torch.autograd.grad((scaled * readout).sum(), exact)
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    assert (slope - wanted).abs().max() <= bound * wanted.abs().max()
    assert saved_bytes(lambda: norm(x), besides=[weight]) == x.nbytes + 4 * ROWS


def test_a_trained_norm_gets_its_gradient() -> None:
    weight = nn.Parameter(torch.randn(WIDTH))
    x = torch.randn(ROWS, WIDTH)
    RMSNorm(weight, 1e-6)(x).sum().backward()
    normalized = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(weight.grad, normalized.sum(0))


def feed_forward(activation: str, route: Route, *, merged: bool = False) -> GatedFeedForward:
    """Frozen layers, adapters with dropout on all of them."""
    shapes = {
        "gate_proj": (INSIDE, WIDTH),
        "up_proj": (INSIDE, WIDTH),
        "down_proj": (WIDTH, INSIDE),
    }
    if merged:
        shapes = {"gate_up_proj": (2 * INSIDE, WIDTH), "down_proj": (WIDTH, INSIDE)}
    layers: dict[str, nn.Module] = {}
    for name, (d_out, d_in) in shapes.items():
        layers[name] = LoraLinear(nn.Linear(d_in, d_out).requires_grad_(False), route, name)
        for adapter in ("one", "two"):
            factors = torch.randn(RANK, d_in) * 0.2, torch.randn(d_out, RANK) * 0.2
            layers[name].put(adapter, LoraFactors(*factors, scaling=2.0, dropout=0.2))
    block = GatedFeedForward(layers, activation)
    block.pennyweight_route = route
    return block


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_a_feed_forward_is_its_formula_for_each_documents_adapter(
    activation: str, merged: bool
) -> None:
    route = Route()
    block = feed_forward(activation, route, merged=merged)
    x = torch.randn(1, ROWS, WIDTH, requires_grad=True)
    readout = torch.randn(1, ROWS, WIDTH)
    trained = [p for p in block.parameters() if p.requires_grad]

    def written_out() -> Tensor:
        if merged:
            gate, up = block.gate_up_proj(x).chunk(2, -1)
        else:
            gate, up = block.gate_proj(x), block.up_proj(x)
        return block.down_proj(ACT2FN[activation](gate) * up)

    with route.over((0, 5, 7, ROWS), ("one", None, "two"), dropout_seed=3):
        ours = block(x), *torch.autograd.grad((block(x) * readout).sum(), [x, *trained])
        plain = written_out(), *torch.autograd.grad((written_out() * readout).sum(), [x, *trained])
        with torch.no_grad():
            torch.testing.assert_close(block(x), plain[0])
    for one, two in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_a_feed_forward_keeps_gate_and_up_and_one_input() -> None:
    route = Route()
    block = feed_forward("silu", route)
    x = torch.randn(1, ROWS, WIDTH, requires_grad=True)
    with route.over((0, ROWS), ("one",), dropout_seed=3):
        kept = saved_bytes(lambda: block(x), besides=block.parameters())
    assert kept == 4 * ROWS * (WIDTH + 2 * INSIDE + 3 * RANK)


def test_a_recomputed_feed_forward_leaves_out_what_nobody_reads() -> None:
    """The gradient of what led to it is the same without the last product."""
    route = Route()
    block = feed_forward("silu", route)
    x = torch.randn(1, ROWS, WIDTH, requires_grad=True)
    with route.over((0, ROWS), ("one",), dropout_seed=3):
        usual = block(x)
        route.recomputing = True
        again = block(x)
        block.kept_after = True
        assert torch.equal(block(x), usual)
        route.recomputing = False
        assert not again.any()
        readout = torch.randn_like(usual)
        slopes = [torch.autograd.grad((y * readout).sum(), x)[0] for y in (usual, again)]
    assert torch.equal(*slopes)


def test_what_a_norm_gives_is_formed_again_for_the_layers_that_read_it() -> None:
    """Of norm and readers the norm's input, 1/rms and each A x are kept; gradients are the same."""
    route = Route()
    norm = RMSNorm(nn.Parameter(torch.randn(WIDTH), requires_grad=False), 1e-5)
    readers = [LoraLinear(nn.Linear(WIDTH, 8).requires_grad_(False), route, n) for n in "qkv"]
    for reader in readers:
        factors = torch.randn(RANK, WIDTH), torch.randn(8, RANK)
        reader.put("one", LoraFactors(*factors, scaling=1.0, dropout=0.2))
    x = torch.randn(1, ROWS, WIDTH, requires_grad=True)
    trained = [x, *(p for r in readers for p in r.parameters() if p.requires_grad)]
    held = [p for part in (norm, *readers) for p in part.parameters()]
    readout = torch.randn(1, ROWS, 8)

    def read(rows: Tensor) -> Tensor:
        return sum((reader(rows) * readout).sum() for reader in readers)

    with route.over((0, ROWS), ("one",), dropout_seed=3):
        kept = saved_bytes(
            lambda: [reader(rows) for rows in [norm(x)] for reader in readers], besides=held
        )
        ours = torch.autograd.grad(read(norm(x)), trained)
        plain = torch.autograd.grad(read(norm(x) + 0), trained)  # the sum says nothing of its parts
    assert kept == 4 * ROWS * (WIDTH + 1 + 3 * RANK)
    for one, two in zip(ours, plain, strict=True):
        assert torch.equal(one, two)


STAND_INS = {
    "llama": (5, 2, 2),
    "mistral": (5, 2, 2),
    "qwen2": (5, 2, 2),
    "qwen3": (9, 2, 2),
    "phi3": (5, 0, 2),
    "stablelm": (0, 0, 2),
    "stablelm_12b": (0, 0, 2),
    "gemma2": (9, 2, 2),
    "gemma3": (13, 2, 2),
    "gpt2": (0, 0, 0),
}


@pytest.mark.parametrize("family", STAND_INS)
def test_the_model_is_the_one_it_was(family: str, tiny_model_folder: Callable[[str], Path]) -> None:
    """Same parameters under the same names, same hidden states to the last bit."""
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder(family)
    base = load_base(BaseConfig(model=str(folder), quantization="none", device="cpu"))
    kinds = [type(layer) for layer in base.module.modules()]
    mine = (RMSNorm, SelfAttention, GatedFeedForward)
    assert tuple(map(kinds.count, mine)) == STAND_INS[family]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert dict(base.module.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    ids = torch.randint(5, 288, (9,))
    with torch.no_grad(), base.route.over((0, 9), (None,)):
        hidden = base.hidden(ids, torch.arange(9))
        expected = theirs.base_model(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)


def kept_by_layer(base: BaseModel, tokens: int) -> Any:
    with base.route.over((0, tokens), ("default",)):
        ids = torch.randint(5, 288, (tokens,))
        held = [*base.module.parameters(), *base.module.buffers()]
        return saved_bytes(lambda: base.hidden(ids, torch.arange(tokens)), besides=held)


def test_nothing_is_kept_below_the_lowest_adapter(tiny_llama_folder: Path) -> None:
    base = load_base(BaseConfig(model=str(tiny_llama_folder), quantization="none", device="cpu"))
    attach(base, LoraConfig(r=2))
    whole = kept_by_layer(base, 24)
    attach(base, LoraConfig(r=2, target_modules=r"model\.layers\.1\..*_proj"), name="upper")
    with base.route.over((0, 24), ("upper",)):
        held = [*base.module.parameters(), *base.module.buffers()]
        ids, at = torch.randint(5, 288, (24,)), torch.arange(24)
        upper = saved_bytes(lambda: base.hidden(ids, at), besides=held)
    assert upper < 0.6 * whole
