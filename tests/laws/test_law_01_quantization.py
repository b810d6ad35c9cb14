"""Law 1: NF4 codes, block scales and double-quantized scales equal bitsandbytes' bit for bit, and
dequantize to the same values (nested: within one unit in the last place); NaN and infinity are
refused."""

from __future__ import annotations

import warnings
from types import ModuleType

import pytest
import torch

from pennyweight.errors import ModelError
from pennyweight.quant import NestedScales, dequantize_4bit, quantize_4bit

SHAPES = [(172, 64), (64, 172), (33, 257), (1, 4099), (512, 130), (40, 48)]


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "bitsandbytes.functional", reason="bitsandbytes, the oracle, is not installed"
        )


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in units in the last place of float32, for values of equal sign."""
    assert torch.equal(a.sign(), b.sign())
    return int((a.float().view(torch.int32) - b.float().view(torch.int32)).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_equal_bitsandbytes(
    bnb: ModuleType, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = (torch.randn(shape) * torch.logspace(-3, 0, shape[1])).to(dtype)
    for nested in (False, True):
        ours = quantize_4bit(weight, double_quantization=nested)
        codes, state = bnb.quantize_4bit(
            weight, blocksize=64, quant_type="nf4", compress_statistics=nested
        )
        assert torch.equal(ours.codes, codes.view(-1))
        # One long row: bitsandbytes 0.50.2 takes wrong scales on AVX-512 where rows end inside a
        # block. An odd count would be compiled.
        state.dtype, state.shape = torch.float32, torch.Size([weight.numel()])
        with torch.compiler.set_stance("force_eager"):
            theirs = bnb.dequantize_4bit(codes, state).reshape(shape)
        values = dequantize_4bit(ours, torch.float32)
        if isinstance(ours.absmax, NestedScales):
            assert torch.equal(ours.absmax.codes, state.absmax)
            assert torch.equal(ours.absmax.absmax, state.state2.absmax)
            assert torch.equal(ours.absmax.offset, state.offset)
            assert ulps_apart(values, theirs) <= 1
        else:
            assert torch.equal(ours.absmax, state.absmax)
            assert torch.equal(values, theirs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_are_refused(bad: float, dtype: torch.dtype) -> None:
    for at in ((0, 0), (6, 30), (12, 4)):
        weight = torch.randn(13, 65).to(dtype)
        weight[at] = bad
        with pytest.raises(ModelError, match="1 values that are not finite"):
            quantize_4bit(weight)
