"""Kernels in Triton's interpreter, on a CPU. Law 10 runs this file in a process of its own, because
TRITON_INTERPRET=1 must be set before Triton is imported and holds for the whole process.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.quant import BLOCK_SIZES, FourBit, NestedScales, Quantized4Bit, quantize_4bit
from pennyweight.quant.blockwise import fill_in_torch
from pennyweight.quant.kernels.dequantize_4bit import agrees_with_torch, fill, fill_part

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNTOUCHED = 7.0

assert os.environ.get("TRITON_INTERPRET") == "1"


def assert_equals_torch(q: Quantized4Bit, dtype: torch.dtype) -> None:
    """The kernel's values are those of pure torch, bit for bit, and it writes nothing else."""
    count = torch.Size(q.shape).numel()
    buffer = torch.full((count + 128,), UNTOUCHED, dtype=dtype)
    fill(q, buffer[64 : 64 + count].view(q.shape))
    assert (buffer[:64] == UNTOUCHED).all()
    assert (buffer[64 + count :] == UNTOUCHED).all()
    values, expected = buffer[64 : 64 + count], torch.empty(count, dtype=dtype)
    fill_in_torch(replace(q, shape=(count,)), expected)
    if dtype == torch.bfloat16 and not torch.equal(values, expected):
        # The interpreter cuts to bfloat16 where a device rounds; so its float32 bits are compared.
        exact = torch.empty(count)
        fill_in_torch(replace(q, shape=(count,)), exact)
        expected = (exact.view(torch.int32) >> 16).to(torch.int16).view(dtype)
    assert torch.equal(values, expected)


shapes = st.one_of(
    st.tuples(st.integers(1, 3000)),
    st.tuples(st.integers(1, 70), st.integers(1, 150)),
    st.sampled_from([(1,), (63,), (64,), (65,), (64 * 256,), (64 * 256 + 64,), (64 * 257 + 33,)]),
)


@settings(deadline=None, max_examples=60)
@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["nf4", "fp4"]),
    block_size=st.sampled_from([32, 64, 64, 64, 128, 256]),
    nested=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_weight_equals_torch(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kind: FourBit,
    block_size: int,
    nested: bool,
    seed: int,
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    q = quantize_4bit(weight, format=kind, block_size=block_size, double_quantization=nested)
    assert_equals_torch(q, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_equals_torch(block_size: int, dtype: torch.dtype) -> None:
    assert_equals_torch(quantize_4bit(torch.randn(2 * 4096 + 331), block_size=block_size), dtype)


def test_a_scale_takes_its_own_group_whatever_the_size_of_groups() -> None:
    q = quantize_4bit(torch.randn(40, 64) * torch.logspace(-3, 1, 40).unsqueeze(1))
    assert isinstance(q.absmax, NestedScales)
    groups = torch.linspace(0.5, 2.0, 14)
    assert_equals_torch(
        replace(q, absmax=replace(q.absmax, absmax=groups, block_size=3)), torch.float32
    )


def test_the_first_trial_on_a_device_passes() -> None:
    assert agrees_with_torch(torch.device("cpu"), torch.float32)
    assert agrees_with_torch(torch.device("cpu"), torch.float16)


@settings(deadline=None, max_examples=30)
@given(
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 5)),
    part=st.tuples(st.integers(0, 8), st.integers(0, 4), st.integers(1, 9), st.integers(1, 5)),
    block_size=st.sampled_from([32, 64, 128]),
    nested=st.booleans(),
)
def test_any_part_of_a_weight_equals_the_whole(
    blocks: tuple[int, int], part: tuple[int, int, int, int], block_size: int, nested: bool
) -> None:
    d_out, across = blocks
    weight = torch.randn(d_out, across * block_size, generator=torch.Generator().manual_seed(d_out))
    q = quantize_4bit(weight, block_size=block_size, double_quantization=nested)
    whole = torch.empty(weight.shape)
    fill_in_torch(q, whole)
    row, column = part[0] % d_out, part[1] % across * block_size
    rows = min(part[2], d_out - row)
    columns = min(part[3] * block_size, weight.shape[1] - column)
    # In a wider buffer, as the one where an adapter's factors stand beside the weight.
    buffer = torch.full((rows + 1, columns + 16), UNTOUCHED)
    fill_part(q, buffer[:rows, :columns], row=row, column=column)
    assert torch.equal(buffer[:rows, :columns], whole[row : row + rows, column : column + columns])
    assert (buffer[rows:] == UNTOUCHED).all()
    assert (buffer[:, columns:] == UNTOUCHED).all()
