"""Row-wise 8-bit storage of a frozen weight, after LLM.int8() (arXiv 2208.07339, section 2).

Codes and scales are those bitsandbytes computes for a weight of the same dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from pennyweight.quant.intake import chunk_elements, refuse_nonfinite, refuse_unfit
from pennyweight.quant.kernels import cpu

__all__ = ["Quantized8Bit", "dequantize_8bit", "fill_in_torch", "quantize_8bit"]


@dataclass(frozen=True, slots=True, eq=False)
class Quantized8Bit:
    """A weight in int8 rows; element [i, j] is codes[i, j] * scale[i] / 127."""

    codes: Int8[Tensor, "rows cols"]
    scale: Float32[Tensor, " rows"]
    dtype: torch.dtype = torch.float16

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.codes.shape
        return rows, cols

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales held in memory."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, to move, hash or register; `with_tensors` is the inverse."""
        return {"codes": self.codes, "scale": self.scale}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Quantized8Bit:
        """The same weight on other tensors, moved ones for instance; not copied."""
        return replace(self, codes=tensors["codes"], scale=tensors["scale"])

    def to_bitsandbytes(self, prefix_name: str = "") -> dict[str, Tensor]:
        """The tensors of a bitsandbytes checkpoint; see `bitsandbytes_layout.to_bitsandbytes`."""
        from pennyweight.quant.bitsandbytes_layout import to_bitsandbytes

        return to_bitsandbytes(self, prefix_name)


def quantize_8bit(weight: Float[Tensor, "rows cols"]) -> Quantized8Bit:
    """Store a matrix as int8 rows, each scaled by its largest magnitude.

    A row whose scale is below 4e-37, too small to divide 127 by in float32, is stored as zeros.
    Raises ModelError as `quantize_4bit` does.
    """
    refuse_unfit(weight)
    weight = weight.detach()
    scale = weight.abs().amax(dim=1).float()
    refuse_nonfinite(weight, scale)
    factor = 127.0 / scale
    factor = torch.where(factor.isfinite(), factor, 0.0).unsqueeze(1)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    rows = max(1, chunk_elements(weight.device) // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        codes[part] = (weight[part] * factor[part]).round_()
    return Quantized8Bit(codes=codes, scale=scale, dtype=weight.dtype)


def dequantize_8bit(
    q: Quantized8Bit,
    dtype: torch.dtype | None = None,
    out: Float[Tensor, "rows cols"] | None = None,
) -> Float[Tensor, "rows cols"]:
    """The matrix again: int8 times row scale times 1/127 in float32, rounded once to `dtype`."""
    if out is None:
        out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.codes.device)
    assert tuple(out.shape) == q.shape, (out.shape, q.shape)
    assert dtype in (None, out.dtype), (dtype, out.dtype)
    if out.is_contiguous() and (kernels := cpu.serving(out)) is not None:
        cpu.fill(kernels, q, out)
    else:
        fill_in_torch(q, out)
    return out


def fill_in_torch(q: Quantized8Bit, out: Float[Tensor, "rows cols"]) -> None:
    """Write the dequantized matrix into `out`; the reference of its kernel."""
    rows = max(1, chunk_elements(out.device) // max(1, out.shape[1]))
    for start in range(0, len(out), rows):
        part = slice(start, start + rows)
        out[part] = (q.codes[part] * q.scale[part].unsqueeze(1)).mul_(1.0 / 127.0)
