from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pennyweight.quant import QuantizedLinear, quantize_4bit, quantize_8bit


def layer(kind: str = "nf4", *, bias: bool = True, **how: Any) -> QuantizedLinear:
    """24 features out, 70 in: rows that do not end where blocks do."""
    weight = torch.randn(24, 70)
    value: Any
    if kind == "int8":
        value = quantize_8bit(weight)
    else:
        value = quantize_4bit(weight, double_quantization=kind == "nf4")
    return QuantizedLinear(value, torch.randn(24) if bias else None, **how)


KINDS = ("nf4", "nf4 plain", "int8")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(), (5,), (2, 3), (0,), (3, 0, 2)])
def test_output_and_input_gradient_equal_the_dense_layer(
    kind: str, bias: bool, rows: tuple[int, ...]
) -> None:
    linear = layer(kind, bias=bias).double()
    x = torch.randn(*rows, 70, dtype=torch.float64, requires_grad=True)
    y = linear(x)
    expected = x @ linear.dequantize(torch.float64).T
    if linear.bias is not None:
        expected = expected + linear.bias
    torch.testing.assert_close(y, expected)
    grad_y = torch.randn_like(y)
    (ours,) = torch.autograd.grad(y, x, grad_y)
    (dense,) = torch.autograd.grad(expected, x, grad_y)
    torch.testing.assert_close(ours, dense)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    linear = layer(kind).double()
    x = torch.randn(2, 70, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(linear, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(linear, x, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_near_float64(dtype: torch.dtype) -> None:
    linear = layer()
    x = torch.randn(6, 70).to(dtype).requires_grad_()
    y = linear(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert x.grad is not None
    dense = linear.dequantize(dtype).double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        y.double(), x.double() @ dense.T + linear.bias, atol=70 * eps, rtol=8 * eps
    )
    torch.testing.assert_close(
        x.grad.double(), dense.sum(0).expand(6, 70), atol=24 * eps, rtol=8 * eps
    )


def test_non_contiguous_input_and_gradient() -> None:
    linear = layer()
    x = torch.randn(70, 4, requires_grad=True)
    y = linear(x.T)
    torch.testing.assert_close(y, linear(x.T.contiguous()))
    y.T.contiguous().T.backward(torch.randn(24, 4).T)
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_no_gradient_reaches_the_base_and_none_is_needed() -> None:
    linear = layer()
    assert list(linear.parameters()) == []
    assert not linear(torch.randn(2, 70)).requires_grad


def test_nothing_is_saved_for_the_backward_pass() -> None:
    saved: list[torch.Tensor] = []
    linear = layer()
    x = torch.randn(5, 70, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = linear(x * 1)
    assert [t for t in saved if t.numel() > 1] == []
    y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(reentrant: bool) -> None:
    linear, x = layer(), torch.randn(3, 70, requires_grad=True)

    def run(h: torch.Tensor) -> torch.Tensor:
        return torch.tanh(linear(h))

    (plain,) = torch.autograd.grad(run(x).sum(), x)
    checkpointed = checkpoint(run, x, use_reentrant=reentrant)
    checkpointed.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, plain)


def test_autocast_takes_the_product_in_its_dtype() -> None:
    linear, x = layer(), torch.randn(3, 70, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert torch.equal(y, linear(x.bfloat16()))
    inside = x.grad.clone()
    x.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    y.float().sum().backward()
    assert torch.equal(x.grad, inside)


def test_compute_dtype_wins_and_the_result_keeps_the_dtype_of_x() -> None:
    linear, x = layer(compute_dtype=torch.bfloat16), torch.randn(3, 70)
    assert linear(x).dtype == torch.float32
    assert torch.equal(linear(x), linear(x.bfloat16()).float())
    exact = layer(compute_dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = exact(x)
    assert torch.equal(y, exact(x))


@pytest.mark.parametrize("kind", KINDS)
def test_moving_between_dtypes_leaves_codes_and_scales(kind: str) -> None:
    linear = layer(kind)
    before = {name: t.clone() for name, t in linear.value.tensors().items()}
    linear.to(torch.bfloat16).half().double().float().type(torch.float16)
    for name, tensor in linear.value.tensors().items():
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor, before[name]), name
    assert linear.bias is not None
    assert linear.bias.dtype == torch.float16


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_is_rebuilt_without_a_copy(kind: str) -> None:
    linear = layer(kind)
    buffers = {t.data_ptr() for t in linear.buffers()}
    assert {t.data_ptr() for t in linear.value.tensors().values()} <= buffers
    assert linear.value.stored_bytes + 4 * 24 == sum(t.nbytes for t in linear.buffers())
    moved = copy.deepcopy(linear).to("meta")
    assert {t.device.type for t in moved.value.tensors().values()} == {"meta"}


@pytest.mark.own_pickle
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_survives_copying_pickling_and_its_state_dict(kind: str) -> None:
    linear, x = layer(kind), torch.randn(2, 70)
    for twin in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(twin(x), linear(x))
    other = layer(kind)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), linear(x))


def test_inference_mode_does_not_spoil_later_training() -> None:
    linear = layer()
    with torch.inference_mode():
        linear(torch.randn(2, 70))
    x = torch.randn(2, 70, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_weight_that_is_kept_gives_the_same_and_is_read_by_inference_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENNYWEIGHT_KERNELS", "off")
    linear, x = layer(kind), torch.randn(3, 70)
    with torch.inference_mode():
        expected = linear(x)
    stored = sum(tensor.nbytes for tensor in linear.state_dict().values())
    assert linear.keep_dense(torch.float32) == 24 * 70 * 4
    assert sum(tensor.nbytes for tensor in linear.state_dict().values()) == stored
    with torch.inference_mode():
        assert torch.equal(linear(x), expected)
        linear.kept.zero_()  # type: ignore[union-attr]
        assert torch.equal(linear(x), linear.bias.expand(3, -1))  # type: ignore[union-attr]
        assert not torch.equal(linear(x.double()), linear.bias.expand(3, -1))  # type: ignore[union-attr]
    torch.testing.assert_close(linear(x), expected)


def test_it_says_what_it_is() -> None:
    assert "in_features=70, out_features=24, bias=True, format=nf4" in repr(layer())
    assert "format=int8" in repr(layer("int8"))
