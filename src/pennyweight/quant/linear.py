"""A frozen linear layer that keeps its weight quantized and multiplies by it on the way.

Forward and input gradient each dequantize the weight and drop it again (QLoRA, arXiv 2305.14314,
equations 5 and 6); there is no weight gradient, so nothing of the input is kept either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pennyweight.quant.blockwise import Quantized4Bit, dequantize_4bit
from pennyweight.quant.kernels import cpu
from pennyweight.quant.rowwise import Quantized8Bit, dequantize_8bit

__all__ = ["QuantizedLinear"]


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W frozen in 4 or 8 bits, `[out_features, in_features]`.

    Codes, scales and bias are buffers: they move with `.to(device)`, and codes and scales keep
    their dtypes under `.to(dtype)`, `.half()` and the like. The product is taken in
    `compute_dtype`, or in autocast's dtype, or in x's. With a `compute_dtype`, y returns in x's
    dtype; else in the dtype of the product, as `nn.Linear` does.

    A layer that stores `[in, out]`, such as GPT-2's Conv1D, is quantized from its transpose.
    """

    codes: Tensor
    absmax: Tensor
    bias: Tensor | None
    kept: Tensor | None

    def __init__(
        self,
        value: Quantized4Bit | Quantized8Bit,
        bias: Float[Tensor, " d_out"] | None = None,
        *,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        assert len(value.shape) == 2, value.shape
        self.out_features, self.in_features = value.shape
        assert bias is None or tuple(bias.shape) == (self.out_features,), bias.shape
        self.compute_dtype = compute_dtype
        stored = value.tensors()
        self._stored_names = tuple(stored)
        # What is not a tensor of the value; its tensors are the buffers, wherever those move.
        self._description = value.with_tensors({name: t.to("meta") for name, t in stored.items()})
        for name, tensor in stored.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("kept", None, persistent=False)
        self._read: tuple[tuple[object, ...], cpu.Weight] | None = None

    @property
    def value(self) -> Quantized4Bit | Quantized8Bit:
        """The stored weight; its tensors are this layer's own, not copies."""
        return self._description.with_tensors(
            {name: self.get_buffer(name) for name in self._stored_names}
        )

    @property
    def described(self) -> Quantized4Bit | Quantized8Bit:
        """The stored weight without its numbers: what its format and shape are."""
        return self._description

    def dequantize(self, dtype: torch.dtype | None = None) -> Float[Tensor, "d_out d_in"]:
        """The dense weight, `[out_features, in_features]`, in its original dtype or in `dtype`."""
        return _dense(self.value, dtype)

    def keep_dense(self, dtype: torch.dtype) -> int:
        """Hold the dequantized weight as well, for passes in `dtype` without gradients: the same
        numbers, dequantized once. Gives its bytes."""
        self.kept = self.dequantize(dtype)
        return self.kept.nbytes

    def forward(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = self.compute_dtype or (torch.get_autocast_dtype(device) if autocast else x.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        y: Tensor
        if torch.is_inference_mode_enabled():
            # A decoded token is little work: a function of autograd's would cost more than some products.
            if self.kept is not None and self.kept.dtype == dtype:
                with _autocast_off(device):
                    y = F.linear(x.to(dtype), self.kept, bias)
            else:
                y = _product(x.to(dtype), self.value, bias, transposed=False)
        else:
            y = _FrozenProduct.apply(x.to(dtype), self.value, bias, False)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def input_gradient(self, grad_y: Float[Tensor, "*rows d_out"]) -> Float[Tensor, "*rows d_in"]:
        """W^T grad_y, in grad_y's dtype: for callers that write their own backward around forward."""
        dtype = self.compute_dtype or grad_y.dtype
        return _product(grad_y.to(dtype), self.value, None, transposed=True).to(grad_y.dtype)

    def stored(self, dtype: torch.dtype) -> cpu.Weight:
        """The value as the CPU's kernels read it, described again where its tensors have moved."""
        tensors = map(self._buffers.__getitem__, self._stored_names)
        stands = (dtype, *(tensor.data_ptr() for tensor in tensors if tensor is not None))
        if self._read is None or self._read[0] != stands:
            self._read = stands, cpu.stored(self.value, dtype)
        return self._read[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": None}

    def extra_repr(self) -> str:
        kind = self._description.format if isinstance(self._description, Quantized4Bit) else "int8"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={kind}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Let `fn` move the stored tensors but not change their dtypes."""
        stored = {id(self._buffers[name]) for name in self._stored_names}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if id(tensor) in stored and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(move, recurse)
        return self


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T + b, or y = x W where `transposed`; either is the other's gradient.

    The value hangs on the context by reference rather than among the saved tensors: hooks that
    offload or recompute saved tensors have no business with the frozen weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        value: Quantized4Bit | Quantized8Bit,
        bias: Tensor | None,
        transposed: bool,
    ) -> Tensor:
        ctx.value, ctx.transposed = value, transposed
        return _product(x, value, bias, transposed=transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        return (
            _FrozenProduct.apply(grads[0], ctx.value, None, not ctx.transposed),
            None,
            None,
            None,
        )


def _product(
    x: Tensor, value: Quantized4Bit | Quantized8Bit, bias: Tensor | None, *, transposed: bool
) -> Tensor:
    """By the CPU's kernels, which never hold the dense weight; elsewhere by way of it."""
    if (kernels := cpu.serving(x)) is not None:
        return cpu.product(kernels, x, value, bias, transposed=transposed)
    with _autocast_off(x.device.type):
        dense = _dense(value, x.dtype)
        return x @ dense if transposed else F.linear(x, dense, bias)


def _dense(value: Quantized4Bit | Quantized8Bit, dtype: torch.dtype | None) -> Tensor:
    if isinstance(value, Quantized8Bit):
        return dequantize_8bit(value, dtype)
    return dequantize_4bit(value, dtype)


def _autocast_off(device: str) -> contextlib.AbstractContextManager[Any]:
    """The operands already have the dtype of the product; entering autocast costs, so only if on."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
