"""Which kernel of a decoder layer serves where, and what its compiler makes of it; no GPU needed. That
they give the right values is law 10."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pennyweight.blocks import kernels
from pennyweight.blocks.kernels import compiled
from pennyweight.blocks.rotation import _turned
from pennyweight.quant.kernels.build import variants
from pennyweight.quant.kernels.cpu import library
from pennyweight.quant.kernels.cpu.library import SWITCH
from pennyweight.quant.kernels.trial import tried

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PENNYWEIGHT_KERNELS", raising=False)
    tried.cache_clear()
    yield
    tried.cache_clear()


def put(monkeypatch: pytest.MonkeyPatch, kernel: str, *, agrees: bool = True) -> SimpleNamespace:
    """A stand-in for a kernel's module that takes rows of at most 8."""
    module = SimpleNamespace(
        agrees_with_torch=lambda *_: agrees, fits=lambda x, *_: x.shape[-1] <= 8
    )
    monkeypatch.setitem(sys.modules, f"{kernels.__name__}.{kernel}", module)
    return module


def test_a_kernel_serves_plain_tensors_of_one_type_that_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = put(monkeypatch, "norm")
    assert kernels.serving("norm", torch.ones(3, 4), torch.ones(4)) is None  # on a CPU
    monkeypatch.setattr(kernels, "DEVICE_TYPE", "cpu")
    x, weight = torch.ones(3, 4), torch.nn.Parameter(torch.ones(4))
    assert kernels.serving("norm", x, weight) is module
    assert kernels.serving("norm", x, weight.bfloat16()) is None
    assert kernels.serving("norm", x.double(), weight.double()) is None
    assert kernels.serving("norm", torch.ones(3, 9)) is None
    with FakeTensorMode():
        assert kernels.serving("norm", torch.ones(3, 4)) is None
    assert kernels.why_eager("norm", torch.device("cpu")) == ""
    assert "mps" in kernels.why_eager("norm", torch.device("mps"))
    monkeypatch.setenv("PENNYWEIGHT_KERNELS", "off")
    assert kernels.serving("norm", x, weight) is None
    assert "PENNYWEIGHT_KERNELS" in kernels.why_eager("norm", torch.device("cpu"))


def test_a_kernel_that_fails_its_trial_is_told_and_the_others_serve(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(monkeypatch, "norm", agrees=False)
    module = put(monkeypatch, "rotation")
    monkeypatch.setattr(kernels, "DEVICE_TYPE", "cpu")
    with pytest.warns(UserWarning, match="`norm` .*other values"):
        assert kernels.serving("norm", torch.ones(3, 4)) is None
    assert "other values" in kernels.why_eager("norm", torch.device("cpu"))
    assert kernels.serving("rotation", torch.ones(3, 4)) is module


def test_a_graph_under_construction_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, "norm")
    monkeypatch.setattr(kernels, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels.serving("norm", torch.ones(3, 4)) is None


@pytest.fixture(params=[*variants()])
def variant(
    untried: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Each set of instructions of the CPU's library that runs here."""
    monkeypatch.setenv(SWITCH, request.param)
    library._chosen.cache_clear()
    if library.chosen() is None:
        pytest.skip(library.why_none())
    yield request.param
    library._chosen.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cpus_norm_and_gate_are_their_formulas(variant: str, dtype: torch.dtype) -> None:
    """Law 10; a row's result does not depend on the rows beside it."""
    x, up, grad = (torch.randn(3, 70, 48).to(dtype) for _ in range(3))
    x[0, 0], x[0, 1] = 60 * x[0, 0], -40 * x[0, 1].abs()  # gates far out
    weight, room = torch.randn(48).to(dtype), max(4 * torch.finfo(dtype).eps, 1e-5)
    wide = [each.double().requires_grad_() for each in (x, up)]
    gate = kernels.serving("feed_forward", x, up)
    pairs = [(gate.gated(x, up, "silu"), torch.nn.functional.silu(wide[0]) * wide[1])]
    slopes = torch.autograd.grad(pairs[0][1], wide, grad.double())
    pairs += zip(gate.gated_back(grad, x, up, "silu", over=None), slopes, strict=True)
    norm = kernels.serving("norm", x, weight)
    for over_one in (False, True):
        n = wide[0] * (wide[0].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        exact = n * (weight.double() + over_one)
        y, inverse = norm.norm(x, weight, 1e-5, wide=over_one)
        assert torch.equal(norm.scaled(x, weight, inverse, wide=over_one), y)
        alone, _ = norm.norm(x[1:2, 5:6], weight, 1e-5, wide=over_one)
        assert torch.equal(alone, y[1:2, 5:6])
        (slope,) = torch.autograd.grad(exact, wide[0], grad.double())
        pairs += [(y, exact), (norm.norm_back(grad, x, weight, inverse, wide=over_one), slope)]
    for found, wanted in pairs:
        assert found.dtype == dtype
        near = room * (wanted.detach().abs() + wanted.detach().abs().mean())
        assert ((found.double() - wanted.detach()).abs() <= near).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cpus_rotation_is_its_formula(variant: str, dtype: torch.dtype) -> None:
    """Law 10: of queries and of fewer keys, both ways; in float32 to the bit what torch gives."""
    angle = 9 * torch.randn(1, 70, 32)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    query = torch.randn(1, 70, 6, 32).to(dtype).transpose(1, 2)
    key = torch.randn(1, 2, 70, 32).to(dtype)
    kernel = kernels.serving("rotation", query, key, cos, sin)
    turned = kernel.rotate(query, key, cos, sin)
    back = kernel.rotate(query, key, cos, sin, back=True)
    for x, found, returned in zip((query, key), turned, back, strict=True):
        wide = x.double().requires_grad_()
        exact = _turned(wide, cos.double()[:, None], sin.double()[:, None])
        (slope,) = torch.autograd.grad(exact, wide, x.double())
        eps = 4 * torch.finfo(dtype).eps  # of products that may cancel
        assert ((found - exact).abs() <= eps * (1 + exact.abs())).all()
        assert ((returned - slope).abs() <= eps * (1 + slope.abs())).all()
        if dtype == torch.float32:
            assert torch.equal(found, _turned(x, cos[:, None], sin[:, None]))
    kept = query.clone()
    assert torch.equal(kernel.rotate(query, key, cos, sin, in_place=True)[0], turned[0])
    assert torch.equal(query, turned[0])
    assert kernels.serving("rotation", kept[..., :24], key[..., :24], cos, sin) is None


@pytest.mark.parametrize("vocab", [5, 48, 2100])
def test_a_cpus_softmax_is_its_formula(variant: str, vocab: int) -> None:
    """Law 10, in bf16: losses, the gradient where the logits lay, and what is no number shows."""
    logits = (4 * torch.randn(9, vocab)).bfloat16()
    wanted = torch.randint(0, vocab, (9,))
    wide = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(wide, wanted, reduction="none")
    (slope,) = torch.autograd.grad(exact.sum(), wide)
    for bad in (torch.nan, torch.inf):
        for place in (0, vocab - 1):
            spoiled = logits.clone()
            spoiled[4, place] = bad
            found = compiled.Softmax.losses(spoiled, wanted, error=False)
            assert found.isfinite().logical_not().nonzero().tolist() == [[4]]
    kept = logits.clone()
    first = compiled.Softmax.losses(logits, wanted, error=False)
    assert torch.equal(logits, kept)
    alone = compiled.Softmax.losses(logits[3:4].clone(), wanted[3:4], error=False)
    assert torch.equal(alone, first[3:4])
    assert torch.equal(compiled.Softmax.losses(logits, wanted, error=True), first)
    torch.testing.assert_close(first.double(), exact.detach(), rtol=1e-5, atol=2e-5)
    assert ((logits.double() - slope).abs() <= 2**-8 * slope.abs() + 1e-7).all()


def test_rows_in_parts_and_other_activations_are_torchs() -> None:
    whole = torch.randn(4, 64)
    assert kernels.serving("feed_forward", *whole.chunk(2, dim=-1)) is None
    assert kernels.serving("norm", torch.ones(0, 16), torch.ones(16)) is None
    assert kernels.serving("rotation", whole, whole, whole, whole) is None


BF16 = "*bf16"
# Kernel, pointers, integers of which the last ones are strides, constants, warps.
LAUNCHES: dict[str, tuple[dict[str, str], tuple[str, ...], dict[str, Any], int]] = {
    "norm._norm": (
        {"x": BF16, "weight": BF16, "inverse": "*fp32", "y": BF16},
        ("rows", "stride"),
        {"D": 4096, "BLOCK": 4096, "ROWS": 1, "WIDE": False, "GIVEN": False},
        8,
    ),
    "norm._norm_back": (
        {"grad_y": BF16, "x": BF16, "weight": BF16, "inverse": "*fp32", "grad_x": BF16},
        ("rows", "grad_stride", "stride"),
        {"D": 4096, "BLOCK": 4096, "ROWS": 1, "WIDE": True},
        8,
    ),
    "feed_forward._gated_back": (
        {"grad": BF16, "gate": BF16, "up": BF16, "grad_gate": BF16, "grad_up": BF16},
        ("gate_stride", "up_stride", "width"),
        {"ACT": "silu", "BLOCK": 1024},
        4,
    ),
    "rotation._rotate": (
        dict.fromkeys(("query", "key", "query_out", "key_out", "cos", "sin"), BF16),
        (
            *("query_head", "query_token", "key_head", "key_token"),
            *("query_out_head", "query_out_token", "key_out_head", "key_out_token", "angle_token"),
        ),
        {
            "QUERY_HEADS": 32,
            "KEY_HEADS": 8,
            "QUERY_TILE": 32,
            "KEY_TILE": 8,
            "HALF": 64,
            "BLOCK": 64,
            "BACK": False,
        },
        4,
    ),
}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_code_for_a_gpu_moves_16_bytes_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launch: str
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e .[kernels-test]")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = for_a_gpu(launch).asm["ptx"]
    assert "st.global.v4.b32" in code
    assert "st.global.b16" not in code
    assert "ld.global.v4.b32" in code
    assert ".local" not in code  # nothing spilled


def for_a_gpu(launch: str) -> Any:
    """The kernel as it is launched for bfloat16, sizes and strides that are multiples of 16."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, function = launch.partition(".")
    pointers, integers, constants, warps = LAUNCHES[launch]
    signature = {**pointers, **dict.fromkeys(integers, "i32")}
    sized = range(len(signature))
    if function == "_norm":
        signature |= {"eps": "fp32"}
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in sized}
    source = getattr(importlib.import_module(f"{kernels.__name__}.{module}"), function)
    return triton.compile(
        ASTSource(source, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
