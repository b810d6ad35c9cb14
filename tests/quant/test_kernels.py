"""Which device code serves where, and what its compiler makes of it; no GPU needed. That a kernel
gives the right values is law 10."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pennyweight.quant.kernels import dequantize_4bit_kernel, why_pure_torch
from pennyweight.quant.kernels.trial import tried

KERNEL = "pennyweight.quant.kernels.dequantize_4bit"
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PENNYWEIGHT_KERNELS", raising=False)
    tried.cache_clear()
    yield
    tried.cache_clear()


def on_a_gpu(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(4, device=CUDA, dtype=dtype)


def kernel_module(monkeypatch: pytest.MonkeyPatch, agrees: Any) -> SimpleNamespace:
    """A stand-in for the module of the kernel, whose trial ends with `agrees()`."""
    module = SimpleNamespace(fill=lambda q, out: None, agrees_with_torch=lambda *_: agrees())
    monkeypatch.setitem(sys.modules, KERNEL, module)
    return module


def test_a_kernel_that_agrees_serves_three_dtypes_on_a_gpu(monkeypatch: Any) -> None:
    module = kernel_module(monkeypatch, lambda: True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dequantize_4bit_kernel(on_a_gpu(dtype)) is module.fill
    assert dequantize_4bit_kernel(on_a_gpu(torch.float64)) is None
    assert dequantize_4bit_kernel(torch.empty(4)) is None
    assert why_pure_torch(CUDA) == ""
    assert "meta" in why_pure_torch(torch.device("meta"))


def test_the_environment_switches_kernels_off(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_module(monkeypatch, lambda: True)
    monkeypatch.setenv("PENNYWEIGHT_KERNELS", "off")
    assert dequantize_4bit_kernel(on_a_gpu()) is None
    assert "PENNYWEIGHT_KERNELS" in why_pure_torch(CUDA)


def test_without_triton_pure_torch_serves_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, KERNEL, raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dequantize_4bit_kernel(on_a_gpu()) is None
    assert "Triton" in why_pure_torch(CUDA)


def no_compiler() -> bool:
    raise RuntimeError("Failed to find C compiler.\nPlease specify one")


@pytest.mark.parametrize(
    ("agrees", "why"), [(lambda: False, "other values"), (no_compiler, "Failed to find C compiler")]
)
def test_a_kernel_that_fails_its_trial_is_told_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch, agrees: Any, why: str
) -> None:
    kernel_module(monkeypatch, agrees)
    with pytest.warns(UserWarning, match=why):
        assert dequantize_4bit_kernel(on_a_gpu()) is None
    assert dequantize_4bit_kernel(on_a_gpu()) is None
    assert why in why_pure_torch(CUDA)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("capability", [80, 90])
def test_code_moves_16_bytes_at_once_rounds_twice_and_counts_in_64_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, part: bool
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e .[kernels-test]")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_for(capability, part=part)
    code = compiled.asm["ptx"]
    assert code.count("st.global.v4.b32") == 1
    assert "st.global.b16" not in code
    assert "cvt.rn.bf16x2.f32" in code
    # A fused multiply-add would round a nested scale once where pure torch rounds twice.
    assert "fma.rn.f32" not in code
    if part:  # whose blocks do not lie side by side: each has an address of its own
        assert "muli" in compiled.asm["ttir"]
        return
    starts = re.findall(r"tt\.addptr %\w+, %\w+ : !tt\.ptr<\w+>, (\w+)", compiled.asm["ttir"])
    assert starts
    assert set(starts) == {"i64"}


def compile_for(capability: int, *, part: bool) -> Any:
    """The kernel as it is launched for blocks of 64, nested scales and bfloat16; for a whole weight,
    or for a part in a buffer whose rows are a multiple of 16 long."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pennyweight.quant.kernels import dequantize_4bit as module

    pointers = {"codes": "*u8", "levels": "*fp32", "scales": "*u8", "dynamic": "*fp32"}
    pointers |= {"group_scales": "*fp32", "offset": "*fp32", "out": "*bf16"}
    constants = {"BLOCK": 64, "ROWS": module._TILE_BYTES // 128, "GROUP": 256, "PART": part}
    integers = ("count", "packed", "across", "total", "offset_blocks", "stride")
    signature = {
        **pointers,
        **dict.fromkeys(integers, "i32"),
        **dict.fromkeys(constants, "constexpr"),
    }
    # Every argument is a multiple of 16, as for any weight whose sides are.
    first = len(pointers)
    sized = [*range(first + 2), first + integers.index("stride")]
    attributes = {(i,): [["tt.divisibility", 16]] for i in sized}
    return triton.compile(
        ASTSource(module._dequantize, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": module._WARPS, "enable_fp_fusion": False},
    )
