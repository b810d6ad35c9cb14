from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pennyweight.errors import ModelError
from pennyweight.quant import dequantize_8bit, quantize_8bit, rowwise, storage_bytes


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 60),
    cols=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    exponent=st.integers(-6, 3),
)
def test_rows_equal_bitsandbytes(
    bnb: ModuleType, rows: int, cols: int, dtype: Any, exponent: int
) -> None:
    weight = (torch.randn(rows, cols) * 10.0**exponent).to(dtype)
    q = quantize_8bit(weight)
    codes, scale, _ = bnb.int8_vectorwise_quant(weight)
    assert torch.equal(q.codes, codes)
    assert torch.equal(q.scale, scale)
    values = bnb.int8_vectorwise_dequant(codes, scale)
    assert torch.equal(dequantize_8bit(q, torch.float32), values)
    assert dequantize_8bit(q).dtype == dtype


def test_rows_that_cannot_be_scaled_become_zeros() -> None:
    weight = torch.tensor([[0.0, -0.0], [1e-44, -1e-44], [1.0, -0.5]])
    values = dequantize_8bit(quantize_8bit(weight))
    torch.testing.assert_close(values, weight, atol=1 / 254, rtol=0)
    assert not values[:2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cols", [1027, 1032])
def test_rows_that_begin_anywhere_are_dequantized_past_the_caches(cols: int, dtype: Any) -> None:
    weight = torch.randn(8200, cols, dtype=dtype)  # 16 MB and more
    q = quantize_8bit(weight)
    whole, few = dequantize_8bit(q), quantize_8bit(weight[4096:4100])
    assert torch.equal(whole[4096:4100], dequantize_8bit(few))


def test_more_rows_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowwise, "chunk_elements", lambda device: 1 << 16)
    weight = torch.randn(700, 1000)
    q = quantize_8bit(weight)
    bound = q.scale.unsqueeze(1) / 127 / 2
    assert ((dequantize_8bit(q) - weight).abs() <= bound * 1.0001).all()
    out = torch.empty(700, 1000, dtype=torch.bfloat16)
    assert dequantize_8bit(q, out=out) is out
    assert torch.equal(out, dequantize_8bit(q).bfloat16())


def test_storage_is_predicted_to_the_byte() -> None:
    assert quantize_8bit(torch.randn(7, 30)).stored_bytes == storage_bytes((7, 30), "int8")


def test_what_is_not_finite_is_counted_and_located() -> None:
    weight = torch.randn(5, 13)
    weight[2, 4] = torch.nan
    with pytest.raises(ModelError, match=r"1 values.*nan at \[2, 4\]"):
        quantize_8bit(weight)
