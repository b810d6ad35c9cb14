"""Products that take adapters along: the calls for one layer, or for several that read the same rows,
into the compiled library. Rows are float32, or bf16 where the processor multiplies it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from pennyweight.quant.kernels.cpu import Weight, threads_for
from pennyweight.quant.kernels.cpu.library import Library

__all__ = [
    "MOST_LAYERS",
    "MOST_RANK",
    "Adapted",
    "Beside",
    "Layer",
    "adapted",
    "adapted_back",
    "describe",
]

# What cpu/adapted.cpp and cpu/product_bf16.cpp take.
MOST_LAYERS: Final = 3
MOST_RANK: Final = 256


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """An adapter beside a weight: float32 masters a `[r, d_in]` and b `[d_out, r]`, contiguous."""

    a: Tensor
    b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A frozen layer as products read its weight, its bias in float32, and its adapter, if any."""

    weight: Weight
    bias: Tensor | None
    beside: Beside | None


class Adapted(ctypes.Structure):
    """`Adapted` of cpu/adapted.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "a", "b")),
        ("rank", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("z", "y", "dz", "to_a", "to_b")),
    )


def adapted(
    kernels: Library, x: Tensor, layers: Sequence[Layer], *, narrow_only: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """x W^T + bias + scaling x A^T B^T of each layer in one sum, unless `narrow_only`; and x A^T
    `[rows, r]` of each that has an adapter."""
    count, inputs = x.numel() // x.shape[-1], x.shape[-1]
    given, outputs, narrow = (Adapted * len(layers))(), list[Tensor](), list[Tensor]()
    work = 0
    for layer, into in zip(layers, given, strict=True):
        describe(layer, into, inputs)
        if layer.beside is not None:
            narrow.append(x.new_empty(count, into.rank))
            into.z = narrow[-1].data_ptr()
        if not narrow_only:
            outputs.append(x.new_empty(*x.shape[:-1], layer.weight.rows))
            into.y = outputs[-1].data_ptr()
            work += layer.weight.rows
    threads = threads_for(count * inputs * work)
    function = kernels.adapted if x.dtype == torch.float32 else kernels.adapted_bf16
    function(ctypes.addressof(given), len(layers), x.data_ptr(), count, threads)
    return outputs, narrow


def adapted_back(
    kernels: Library,
    grads: Sequence[Tensor],
    layers: Sequence[Layer],
    x: Tensor,
    narrow: Sequence[Tensor],
    *,
    of_x: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """From the gradients of what `adapted` gave, its x and its narrow products: that of x, summed over
    the layers, if it is asked for, and of each adapter's A and B, if they are trained."""
    count, inputs = x.numel() // x.shape[-1], x.shape[-1]
    given, kept, of_factors = (Adapted * len(layers))(), iter(narrow), list[Tensor | None]()
    to_x = torch.empty_like(x) if of_x else None
    held, work = list[Tensor](), 0
    for layer, into, grad in zip(layers, given, grads, strict=True):
        describe(layer, into, inputs)
        into.y = grad.data_ptr()
        work += layer.weight.rows
        if (beside := layer.beside) is None:
            continue
        z = next(kept)
        held.append(torch.empty_like(z))
        into.z, into.dz = z.data_ptr(), held[-1].data_ptr()
        to_a = torch.empty_like(beside.a) if beside.a.requires_grad else None
        to_b = torch.empty_like(beside.b) if beside.b.requires_grad else None
        into.to_a = None if to_a is None else to_a.data_ptr()
        into.to_b = None if to_b is None else to_b.data_ptr()
        of_factors += [to_a, to_b]
    read = ctypes.addressof(given), len(layers), x.data_ptr(), count
    at, threads = None if to_x is None else to_x.data_ptr(), threads_for(count * inputs * work)
    if x.dtype == torch.float32:
        spare = torch.empty_like(x) if of_x and len(layers) > 1 else None
        kernels.adapted_back(*read, at, None if spare is None else spare.data_ptr(), threads)
    else:
        kernels.adapted_back_bf16(*read, at, threads)
    return to_x, of_factors


def describe(layer: Layer, into: Adapted, inputs: int) -> None:
    """For the library, which reads the layer's tensors; they must outlive the call."""
    assert layer.weight.columns == inputs, (layer.weight.columns, inputs)
    into.weight = ctypes.addressof(layer.weight)
    if layer.bias is not None:
        into.bias = layer.bias.data_ptr()
    if (beside := layer.beside) is None:
        return
    a, b = beside.a, beside.b
    rank = a.shape[0]
    assert a.shape[1] == inputs
    assert b.shape == (layer.weight.rows, rank)
    into.a, into.b, into.rank, into.scaling = a.data_ptr(), b.data_ptr(), rank, beside.scaling
