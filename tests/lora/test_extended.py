"""Base and adapter as one product each way give what they give apart: values and all gradients."""

from __future__ import annotations

import pytest
import torch

from pennyweight.lora.extended import extended_product
from pennyweight.lora.layer import lora_delta
from pennyweight.quant import dequantize_4bit, dequantize_4bit_part, quantize_4bit


@pytest.mark.parametrize(("d_out", "d_in", "r"), [(96, 64, 4), (64, 192, 16), (40, 128, 1)])
def test_one_product_is_base_and_adapter(d_out: int, d_in: int, r: int) -> None:
    drawn = torch.Generator().manual_seed(d_out)
    q = quantize_4bit(torch.randn(d_out, d_in, generator=drawn))
    x, a, b = (
        torch.randn(shape, generator=drawn, requires_grad=True)
        for shape in ((7, d_in), (r, d_in), (d_out, r))
    )
    grad = torch.randn(7, d_out, generator=drawn)

    apart = x @ dequantize_4bit(q).T + lora_delta(x, a, b, scaling=0.5)
    expected = torch.autograd.grad(apart, (x, a, b), grad)
    together = extended_product(x, q, a, b, 0.5)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(torch.autograd.grad(together, (x, a, b), grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_without_a_gradient_for_x_the_factors_have_theirs() -> None:
    q = quantize_4bit(torch.randn(64, 64))
    a, b = torch.randn(2, 64, requires_grad=True), torch.randn(64, 2, requires_grad=True)
    extended_product(torch.randn(3, 64), q, a, b, 1.0).sum().backward()
    assert a.grad is not None
    assert b.grad is not None


def test_a_part_of_a_weight_is_that_part_of_the_whole() -> None:
    q = quantize_4bit(torch.randn(20, 192))
    buffer = torch.full((5, 140), 7.0)
    dequantize_4bit_part(q, buffer[:, :128], row=3, column=64)
    assert torch.equal(buffer[:, :128], dequantize_4bit(q)[3:8, 64:192])
    assert (buffer[:, 128:] == 7.0).all()
