"""A whole decoder layer on a CPU, each way in one call into the compiled library: what it is told of a
layer and of a pass."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from pennyweight.quant.kernels.cpu.adapted import Adapted, Layer, describe
from pennyweight.quant.kernels.cpu.library import Library

__all__ = ["LAYERS", "FrozenNorm", "WholeLayer"]

# In this order.
LAYERS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _Norm(ctypes.Structure):
    """`FrozenNorm` of cpu/decoder_layer.cpp."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("wide_weight", ctypes.c_bool),
    )


class _DecoderLayer(ctypes.Structure):
    """`DecoderLayer` of cpu/decoder_layer.cpp."""

    _fields_ = (
        ("layers", Adapted * len(LAYERS)),
        ("norms", _Norm * 2),
        ("head_width", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("trained", ctypes.c_bool * (2 * len(LAYERS))),
    )


class _Pass(ctypes.Structure):
    """`Pass` of cpu/decoder_layer.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "boundaries")),
        *((name, ctypes.c_int64) for name in ("documents", "tokens")),
        *((name, ctypes.c_void_p) for name in ("kept", "spare", "y", "grad", "to_x", "to_masters")),
        ("threads", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True, eq=False)
class FrozenNorm:
    """A norm's weight, contiguous, and how it is applied."""

    weight: Tensor
    eps: float
    wide_weight: bool


@dataclass(frozen=True, slots=True, eq=False)
class WholeLayer:
    """A layer as the library reads it, and the tensors it reads, which stay while it may be asked."""

    kernels: Library
    layers: Sequence[Layer]
    norms: Sequence[FrozenNorm]
    struct: _DecoderLayer
    masters: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        kernels: Library,
        layers: Sequence[Layer],
        norms: Sequence[FrozenNorm],
        *,
        head_width: int,
        scaling: float,
    ) -> WholeLayer:
        """Of `LAYERS`, none with a bias, and the norms before attention and the feed-forward."""
        struct = _DecoderLayer(head_width=head_width, scaling=scaling)
        masters = list[Tensor]()
        for place, layer in enumerate(layers):
            assert layer.bias is None
            describe(layer, struct.layers[place], layer.weight.columns)
            if (beside := layer.beside) is not None:
                masters += (beside.a, beside.b)
                struct.trained[2 * place] = beside.a.requires_grad
                struct.trained[2 * place + 1] = beside.b.requires_grad
        for place, norm in enumerate(norms):
            struct.norms[place] = _Norm(norm.weight.data_ptr(), norm.eps, norm.wide_weight)
        return cls(kernels, layers, norms, struct, masters)

    def passed(
        self,
        x: Float[Tensor, "1 tokens d"],
        cos: Float[Tensor, "1 tokens head"],
        sin: Float[Tensor, "1 tokens head"],
        boundaries: Sequence[int],
    ) -> tuple[Float[Tensor, "1 tokens d"], Float[Tensor, " numbers"]]:
        """The output; and what `back` reads beside x and the angles."""
        y = torch.empty_like(x)
        kept_bytes, spare_bytes, _ = self._bytes(x)
        kept, spare = x.new_empty(kept_bytes // 4), x.new_empty(spare_bytes // 4)
        self._run("decoder_layer", x, cos, sin, boundaries, kept=kept, spare=spare, y=y)
        return y, kept

    def back(
        self,
        grad_y: Float[Tensor, "1 tokens d"],
        x: Float[Tensor, "1 tokens d"],
        cos: Float[Tensor, "1 tokens head"],
        sin: Float[Tensor, "1 tokens head"],
        kept: Float[Tensor, " numbers"],
        boundaries: Sequence[int],
        *,
        of_x: bool,
    ) -> tuple[Float[Tensor, "1 tokens d"] | None, list[Tensor | None]]:
        """Gradients of x, if it is asked for, and of the masters that are trained."""
        trained = [master for master in self.masters if master.requires_grad]
        sizes = [master.numel() for master in trained]
        flat = x.new_empty(sum(sizes))
        to_x = torch.empty_like(x) if of_x else None
        spare = x.new_empty(self._bytes(x)[2] // 4)
        self._run(
            "decoder_layer_back", x, cos, sin, boundaries,
            kept=kept, spare=spare, grad=grad_y.contiguous(), to_x=to_x, to_masters=flat,
        )  # fmt: skip
        found = iter(flat.split(sizes))
        return to_x, [
            next(found).view_as(master) if master.requires_grad else None for master in self.masters
        ]

    def _bytes(self, x: Tensor) -> tuple[int, int, int]:
        """Of what is kept, and of what forward and backward need meanwhile."""
        sizes = (ctypes.c_int64 * 3)()
        given = ctypes.addressof(self.struct), x.shape[-2], ctypes.addressof(sizes)
        self.kernels.decoder_layer_bytes(*given)
        return sizes[0], sizes[1], sizes[2]

    def _run(
        self,
        function: str,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        boundaries: Sequence[int],
        **rest: Tensor | None,
    ) -> None:
        ends = (ctypes.c_int64 * len(boundaries))(*boundaries)
        given = _Pass(
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            boundaries=ctypes.addressof(ends),
            documents=len(boundaries) - 1,
            tokens=boundaries[-1],
            threads=torch.get_num_threads(),
            **{name: None if each is None else each.data_ptr() for name, each in rest.items()},
        )
        getattr(self.kernels, function)(ctypes.addressof(self.struct), ctypes.addressof(given))
