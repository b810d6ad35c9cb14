from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.errors import ModelError
from pennyweight.quant import (
    BLOCK_SIZES,
    NF4_LEVELS,
    NestedScales,
    Quantized4Bit,
    block_scales,
    dequantize_4bit,
    intake,
    quantize_4bit,
    storage_bytes,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_equals_oracle(weight: torch.Tensor, bnb: ModuleType, **how: Any) -> Quantized4Bit:
    """Codes, scales and values equal bitsandbytes', bit for bit."""
    ours = quantize_4bit(weight, **how)
    codes, state = bnb.quantize_4bit(
        weight,
        blocksize=ours.block_size,
        quant_type=ours.format,
        compress_statistics=isinstance(ours.absmax, NestedScales),
    )
    assert torch.equal(ours.codes, codes.view(-1))
    if isinstance(ours.absmax, NestedScales):
        assert torch.equal(ours.absmax.codes, state.absmax)
        assert torch.equal(ours.absmax.absmax, state.state2.absmax)
        assert torch.equal(ours.absmax.offset, state.offset)
    else:
        assert torch.equal(ours.absmax, state.absmax)
    # One long row: bitsandbytes 0.50.2 takes wrong scales on AVX-512 where rows end inside a block.
    state.shape = torch.Size([weight.numel()])
    values = bnb.dequantize_4bit(codes, state).reshape(weight.shape)
    expected = dequantize_4bit(ours)
    if weight.dtype == torch.bfloat16:
        # The AVX512-BF16 conversion that bitsandbytes uses takes subnormal float32 for zero.
        subnormal = dequantize_4bit(ours, torch.float32).abs() < torch.finfo(torch.float32).tiny
        expected = torch.where(subnormal & (values == 0), 0.0, expected)
    assert torch.equal(expected, values)
    return ours


def random_weight(shape: tuple[int, ...], dtype: torch.dtype, exponent: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + exponent)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponent
    largest = torch.finfo(dtype).max
    return weight.clamp(-largest, largest).to(dtype)


shapes = st.one_of(
    st.tuples(st.integers(1, 40_000)),
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 200)),
)


@settings(deadline=None, max_examples=150)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["nf4", "fp4"]),
    double_quantization=st.booleans(),
    exponent=st.integers(-44, 4),
)
def test_any_weight_equals_bitsandbytes(
    bnb: ModuleType, shape: Any, dtype: Any, kind: Any, double_quantization: Any, exponent: int
) -> None:
    weight = random_weight(shape, dtype, exponent)
    assert_equals_oracle(weight, bnb, format=kind, double_quantization=double_quantization)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_size_equals_bitsandbytes(
    bnb: ModuleType, block_size: int, dtype: torch.dtype
) -> None:
    weight = random_weight((70, 130), dtype, -2)
    assert_equals_oracle(weight, bnb, block_size=block_size)


ZEROS, NEGATIVE_ZEROS = torch.zeros(3, 96), torch.full((3, 96), -0.0)
WORST = {
    "zeros": ZEROS,
    "negative zeros": NEGATIVE_ZEROS,
    "one zero": torch.zeros(1, 1),
    "constants": torch.full((5, 100), -3.25),
    "a block of zeros among others": torch.cat([torch.randn(1, 64), torch.zeros(1, 64)]),
    "subnormal": torch.linspace(-1e-40, 1e-40, 200),
    "smallest subnormal": torch.tensor([1.4e-45, -1.4e-45] * 40),
    "around the smallest scale": torch.linspace(-1.2e-38, 1.2e-38, 640),
    "huge": torch.linspace(-1.0, 1.0, 64) * 3.4e38,
    "one outlier": torch.cat([torch.full((63,), 1e-6), torch.tensor([1e6])]),
    "on the midpoints": torch.cat([(torch.linspace(-1, 1, 2049)), torch.ones(1)]),
}


@pytest.mark.parametrize("name", WORST)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quantization", [False, True])
def test_worst_cases_equal_bitsandbytes(
    bnb: ModuleType, name: str, kind: Any, double_quantization: bool
) -> None:
    how = {"format": kind, "double_quantization": double_quantization}
    assert_equals_oracle(WORST[name], bnb, **how)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_values_on_and_beside_a_midpoint_equal_bitsandbytes(bnb: ModuleType, kind: Any) -> None:
    from pennyweight.quant.formats import thresholds

    middles = torch.tensor(thresholds(kind))
    up, down = middles.nextafter(torch.tensor(2.0)), middles.nextafter(torch.tensor(-2.0))
    weight = torch.cat([middles, up, down, torch.ones(19)])
    assert_equals_oracle(weight, bnb, format=kind, double_quantization=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nested_scales_of_many_groups_equal_bitsandbytes(
    bnb: ModuleType, dtype: torch.dtype
) -> None:
    """A wide spread of scales reaches every part of the 8-bit format."""
    spread = torch.logspace(-6, 2, 3000).unsqueeze(1)
    ours = assert_equals_oracle((torch.randn(3000, 64) * spread).to(dtype), bnb)
    assert isinstance(ours.absmax, NestedScales)
    assert ours.absmax.codes.unique().numel() > 100


def test_a_weight_larger_than_one_chunk_equals_bitsandbytes(
    bnb: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "chunk_elements", lambda device: 1 << 13)
    weight = torch.randn(5 * (1 << 13) + 97)
    assert_equals_oracle(weight, bnb)


def test_a_transposed_weight_is_stored_in_its_row_major_order() -> None:
    weight = torch.randn(33, 70)
    transposed, copied = quantize_4bit(weight.T), quantize_4bit(weight.T.contiguous())
    assert torch.equal(transposed.codes, copied.codes)
    assert transposed.shape == (70, 33)


def test_dequantized_levels_are_within_half_a_gap_of_the_weight() -> None:
    weight = torch.randn(100, 64)
    q = quantize_4bit(weight, double_quantization=False)
    gap = 1.0 - 0.6961928009986877
    bound = block_scales(q).unsqueeze(1) * gap / 2
    assert ((dequantize_4bit(q) - weight).abs() <= bound * 1.0001).all()


def test_quantizing_again_changes_nothing() -> None:
    once = quantize_4bit(torch.randn(40, 64), double_quantization=False)
    again = quantize_4bit(dequantize_4bit(once), double_quantization=False)
    assert torch.equal(once.codes, again.codes)
    assert torch.equal(once.absmax, again.absmax)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(7, 9), (64, 64)])
def test_dequantizing_rounds_the_float32_product_once(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    q = quantize_4bit(torch.randn(shape))
    exact = dequantize_4bit(q, torch.float32)
    assert torch.equal(dequantize_4bit(q, dtype), exact.to(dtype))
    out = torch.full(shape, torch.nan, dtype=dtype)
    assert dequantize_4bit(q, out=out) is out
    assert torch.equal(out, exact.to(dtype))


def test_rows_that_end_inside_a_block_take_each_block_with_its_own_scale() -> None:
    weight = torch.arange(1.0, 241.0).view(5, 48)
    q = quantize_4bit(weight, double_quantization=False)
    scale = torch.tensor([64.0, 128.0, 192.0, 240.0]).repeat_interleave(64)[:240].view(5, 48)
    nearest = (weight / scale).unsqueeze(-1) - NF4_LEVELS
    levels = NF4_LEVELS[nearest.abs().argmin(dim=-1)]
    assert torch.equal(dequantize_4bit(q), levels * scale)


def test_the_original_dtype_returns() -> None:
    assert dequantize_4bit(quantize_4bit(torch.randn(4, 4).half())).dtype == torch.float16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [(0, 3), (4, 12)])
def test_what_is_not_finite_is_counted_and_located(bad: float, at: tuple[int, int]) -> None:
    weight = torch.randn(5, 13)
    weight[at] = bad
    weight[4, 12] = bad
    count = int((~weight.isfinite()).sum())
    with pytest.raises(ModelError) as refusal:
        quantize_4bit(weight)
    message = str(refusal.value)
    assert f"{count} values" in message
    assert str(list(at)) in message
    assert str(bad) in message


def test_unfit_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="float64"):
        quantize_4bit(torch.randn(4, 4, dtype=torch.float64))
    with pytest.raises(ModelError, match="nothing to quantize"):
        quantize_4bit(torch.zeros(0, 4))
    with pytest.raises(ModelError, match="block size 48"):
        quantize_4bit(torch.randn(4, 48), block_size=48)


def test_scales_that_overflow_their_mean_are_refused() -> None:
    with pytest.raises(ModelError, match="without it"):
        quantize_4bit(torch.full((4, 64), 3e38))


def test_nested_nf4_takes_4_127_bits_a_parameter() -> None:
    """QLoRA, section 3: 4 + 8/64 + 32/(64 * 256), and 4 + 32/64 without; the offset is 4 bytes."""
    count = 4096 * 4096
    bits = 8 * (storage_bytes((4096, 4096), "nf4", True) - 4) / count
    assert bits == 4 + 8 / 64 + 32 / (64 * 256)
    assert round(bits, 3) == 4.127
    plain = 8 * storage_bytes((4096, 4096), "nf4", False) / count
    assert plain == 4.5
    assert round(plain - bits, 3) == 0.373


@given(shape=shapes, kind=st.sampled_from(["nf4", "fp4"]), double=st.booleans())
@settings(deadline=None, max_examples=30)
def test_storage_is_predicted_to_the_byte(shape: Any, kind: Any, double: bool) -> None:
    q = quantize_4bit(torch.ones(shape), format=kind, double_quantization=double)
    assert q.stored_bytes == storage_bytes(shape, kind, double)


@pytest.mark.parametrize("double_quantization", [False, True])
def test_tensors_and_with_tensors_are_inverse(double_quantization: bool) -> None:
    q = quantize_4bit(torch.randn(9, 40), double_quantization=double_quantization)
    moved = q.with_tensors({name: t.clone() for name, t in q.tensors().items()})
    assert all(torch.equal(moved.tensors()[name], t) for name, t in q.tensors().items())
    assert q.with_tensors(q.tensors()).codes is q.codes


def test_temporary_memory_is_a_few_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes allocated at once while quantizing do not grow with the weight."""
    monkeypatch.setattr(intake, "chunk_elements", lambda device: 1 << 16)
    weight = torch.randn(16 << 16)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        quantize_4bit(weight)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak < weight.nbytes / 2


@pytest.mark.gpu
def test_a_device_gives_the_codes_of_the_cpu() -> None:
    weight = torch.randn(300, 257)
    for kind in ("nf4", "fp4"):
        here = quantize_4bit(weight, format=kind, double_quantization=False)
        there = quantize_4bit(weight.cuda(), format=kind, double_quantization=False)
        assert torch.equal(here.codes, there.codes.cpu())
        assert torch.equal(here.absmax, there.absmax.cpu())
        assert torch.equal(dequantize_4bit(here), dequantize_4bit(there).cpu())
