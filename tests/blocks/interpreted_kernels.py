"""Kernels of a decoder layer in Triton's interpreter, on a CPU. Law 10 runs this file in a process of
its own, because TRITON_INTERPRET=1 must be set before Triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pennyweight.blocks import GatedFeedForward, RMSNorm
from pennyweight.blocks import kernels as room
from pennyweight.blocks.feed_forward import ACTIVATIONS
from pennyweight.blocks.kernels import feed_forward, norm, rotation
from pennyweight.blocks.rotation import rotate
from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.lora import attach, trained_parameters
from pennyweight.loss import summed_cross_entropy
from pennyweight.model import load_base
from pennyweight.quant.kernels import cpu, dequantize_4bit
from pennyweight.route import Route
from pennyweight.train import saved_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")

assert os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter's numpy says so where a device is silent: 1 / (1 + inf) is the 0 that is wanted.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@pytest.fixture
def kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """They serve on this CPU as they would on a GPU."""
    monkeypatch.setattr(room, "DEVICE_TYPE", "cpu")


def near(found: Tensor, exact: Tensor) -> bool:
    """Within a few roundings of float64's, counted from 1 where all is small: 1 + erf(x) cancels far
    out. The interpreter cuts to bfloat16 where a device rounds."""
    eps = torch.finfo(found.dtype).eps
    room_for_rounding = max(1e-5, (4 if found.dtype == torch.bfloat16 else 2) * eps)
    return bool(
        (found.double() - exact).abs().max() <= room_for_rounding * exact.abs().max().clamp(min=1)
    )


def drawn(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Rows one after the other, or as a part of wider ones, or with columns apart."""
    made = torch.randn(*shape, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "apart":
        return made[..., 1]
    if layout == "part":
        return made.flatten(-2)[..., 1 : 1 + shape[-1]]
    return made[..., 0].contiguous()


layouts = st.sampled_from(["dense", "dense", "part", "apart"])
sizes = st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 17, 64, 129, 1000, 2049]))


@settings(deadline=None, max_examples=25)
@given(
    size=sizes,
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    x_layout=layouts,
    grad_layout=layouts,
    seed=st.integers(0, 2**31),
)
def test_any_norm_is_its_formula(
    size: tuple[int, int],
    dtype: torch.dtype,
    wide: bool,
    x_layout: str,
    grad_layout: str,
    seed: int,
) -> None:
    x, grad = drawn(size, dtype, x_layout, seed), drawn(size, dtype, grad_layout, seed + 1)
    weight = drawn(size[1:], dtype, "dense", seed + 2)
    exact = x.double().requires_grad_()
    n = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    wanted = n * (weight.double() + wide)
    (slope,) = torch.autograd.grad(wanted, exact, grad.double())
    y, inverse = norm.norm(x, weight, 1e-5, wide=wide)
    assert near(y, wanted.detach())
    assert torch.equal(norm.scaled(x, weight, inverse, wide=wide), y)
    # In one column dx is nearly 0, the difference of numbers of dy's size.
    if size[1] > 1:
        assert near(norm.norm_back(grad, x, weight, inverse, wide=wide), slope)
    # A row's sum knows nothing of its neighbours.
    alone, _ = norm.norm(x[-1:], weight, 1e-5, wide=wide)
    assert torch.equal(alone, y[-1:])


@settings(deadline=None, max_examples=25)
@given(
    size=sizes,
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    gate_layout=layouts,
    grad_layout=layouts,
    fresh=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_gate_is_its_formula(
    size: tuple[int, int],
    dtype: torch.dtype,
    activation: str,
    gate_layout: str,
    grad_layout: str,
    fresh: bool,
    seed: int,
) -> None:
    gate, up = (drawn(size, dtype, gate_layout, seed + i) * 3 for i in range(2))
    grad = drawn(size, dtype, grad_layout, seed + 2)
    exact = [each.double().requires_grad_() for each in (gate, up)]
    wanted = ACTIVATIONS[activation][0](exact[0]) * exact[1]
    slopes = torch.autograd.grad(wanted, exact, grad.double())
    product = feed_forward.gated(gate, up, activation)
    assert near(product, wanted.detach())
    over = None if fresh else product
    found = feed_forward.gated_back(grad, gate, up, activation, over=over)
    assert all(near(one, two) for one, two in zip(found, slopes, strict=True))
    assert fresh or found[1] is product


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_gates_far_out_are_what_torch_makes_of_them(activation: str) -> None:
    gate = torch.tensor([[-1e4, -90.0, -30.0, -0.0, 0.0, 30.0, 90.0, 1e4]])
    gate = gate.requires_grad_()
    wanted = ACTIVATIONS[activation][0](gate)
    (slope,) = torch.autograd.grad(wanted.sum(), gate)
    ones = torch.ones_like(gate)
    value = feed_forward.gated(gate.detach(), ones, activation)
    found, _ = feed_forward.gated_back(
        torch.ones_like(gate), gate.detach(), ones, activation, over=None
    )
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(
    tokens=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (4, 2), (5, 3), (6, 1)]),
    head_dim=st.sampled_from([2, 6, 16, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    token_major=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_rotation_is_its_formula(
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    token_major: bool,
    seed: int,
) -> None:
    def rows(count: int, seed: int) -> Tensor:
        shape = (1, tokens, count, head_dim) if token_major else (1, count, tokens, head_dim)
        made = drawn(shape, dtype, "dense", seed)
        return made.transpose(1, 2) if token_major else made

    given_ = [rows(count, seed + i).requires_grad_() for i, count in enumerate(heads)]
    grads = [rows(count, seed + 2 + i) for i, count in enumerate(heads)]
    cos, sin = (drawn((1, tokens, head_dim), dtype, "dense", seed + 4 + i) for i in range(2))
    exact = [each.detach().double().requires_grad_() for each in given_]
    turned = rotate(*exact, cos.double(), sin.double())  # float64 has no kernel
    slopes = torch.autograd.grad(turned, exact, [g.double() for g in grads])
    plain = rotate(*given_, cos, sin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "DEVICE_TYPE", "cpu")
        ours = rotate(*given_, cos, sin)
        found = torch.autograd.grad(ours, given_, grads)
        copies = [each.detach().clone() for each in given_]
        in_place = rotate(*copies, cos, sin)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(in_place, copies, strict=True))
    for mine, again, theirs, wanted in zip(ours, in_place, plain, turned, strict=True):
        assert near(mine, wanted.detach())
        assert torch.equal(mine, again)
        assert dtype != torch.float32 or torch.equal(mine, theirs)
    assert all(near(one, two) for one, two in zip(found, slopes, strict=True))


@pytest.mark.parametrize("kernel", room.KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_trial_on_a_device_passes(kernel: str, dtype: torch.dtype) -> None:
    module = {"norm": norm, "feed_forward": feed_forward, "rotation": rotation}[kernel]
    assert module.agrees_with_torch(CPU, dtype)


@pytest.mark.parametrize("wide", [False, True])
def test_a_norm_keeps_no_more_than_without_a_kernel(kernels_serve: None, wide: bool) -> None:
    layer = RMSNorm(nn.Parameter(torch.randn(24), requires_grad=False), 1e-6, wide_weight=wide)
    x = torch.randn(1, 10, 24, requires_grad=True)
    assert room.serving("norm", x, layer.weight) is norm
    assert saved_bytes(lambda: layer(x), besides=[layer.weight]) == x.nbytes + 4 * 10
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.clone()))


def test_a_feed_forward_keeps_no_more_than_without_a_kernel(
    kernels_serve: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: dict[str, nn.Module] = {
        name: nn.Linear(*shape).requires_grad_(False)
        for name, shape in {"gate_up_proj": (16, 80), "down_proj": (40, 16)}.items()
    }
    block = GatedFeedForward(layers, "silu")
    block.pennyweight_route = Route()
    x = torch.randn(1, 9, 16, requires_grad=True)
    kept = saved_bytes(lambda: block(x), besides=block.parameters())
    assert kept == 9 * 4 * 80
    (slope,) = torch.autograd.grad(block(x).square().sum(), x)
    monkeypatch.setenv("PENNYWEIGHT_KERNELS", "off")
    (wanted,) = torch.autograd.grad(block(x).square().sum(), x)
    torch.testing.assert_close(slope, wanted)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_law_4_holds_with_every_kernel(
    family: str, tiny_model_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients over NF4 are those without kernels; packed documents are those apart."""
    base = load_base(BaseConfig(model=str(tiny_model_folder(family)), device="cpu"))
    attach(base, LoraConfig(r=4, lora_alpha=8))
    parameters = list(trained_parameters(base, "default").values())
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    ids = torch.randint(5, 288, (24,), generator=draw)

    def learned(*bounds: int) -> list[Tensor]:
        """Summed loss and gradients of these documents in one row."""
        part = ids[bounds[0] : bounds[-1]]
        places = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])
        offsets = tuple(b - bounds[0] for b in bounds)
        with base.route.over(offsets, ("default",) * (len(bounds) - 1)):
            trained = torch.ones(len(part), dtype=torch.bool)
            hidden = base.hidden(part, places)
            total, _ = summed_cross_entropy(hidden, part, trained, offsets, base.head)
            return [total.detach(), *torch.autograd.grad(total, parameters)]

    without = learned(0, 10, 24)
    launches = counted(monkeypatch)
    packed = learned(0, 10, 24)
    apart = [one + two for one, two in zip(learned(0, 10), learned(10, 24), strict=True)]
    assert all(launches.values()), launches
    for mine, plain, summed in zip(packed, without, apart, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine, summed, rtol=1e-4, atol=1e-4)


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Let every kernel serve, that of 4-bit weights too; gives how often each function was called."""
    monkeypatch.setattr(room, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(cpu, "serving", lambda tensor: None)
    monkeypatch.setattr(
        "pennyweight.quant.blockwise.dequantize_4bit_kernel", lambda out: dequantize_4bit.fill
    )
    launches: dict[str, int] = {}

    def watch(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counting(*values: Any, **named: Any) -> Any:
            launches[name] += 1
            return function(*values, **named)

        launches[name] = 0
        monkeypatch.setattr(module, name, counting)

    for module, name in (
        (norm, "norm"),
        (norm, "norm_back"),
        (norm, "scaled"),
        (feed_forward, "gated"),
        (feed_forward, "gated_back"),
        (rotation, "rotate"),
        (dequantize_4bit, "fill"),
    ):
        watch(module, name)
    return launches
