"""Factors of several adapters side by side, so that a short pass over all of them is two products.

A pass that decodes has a token or a few for each adapter; product by product it would cost by the
kernels' starts. Batched products (as SGMV in Punica, Chen et al. 2023) start two a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from pennyweight.route import Mixture

__all__ = ["FactorStack", "Factors"]


@runtime_checkable
class Factors(Protocol):
    """One adapter's factors on one layer."""

    scaling: float
    _parameters: dict[str, Any]

    @property
    def lora_A(self) -> Tensor: ...  # noqa: N802 - as PEFT names it

    @property
    def lora_B(self) -> Tensor: ...  # noqa: N802


@dataclass(frozen=True, slots=True, eq=False)
class FactorStack:
    """Factors of several adapters on one layer, stacked so that a short pass is two products of
    batches; smaller ranks are filled up with zeros, and an adapter that is not here is all zeros.

    Groups never mix: a NaN in one adapter stays in its own rows.
    """

    names: tuple[str, ...]
    a: Float[Tensor, "groups d_in r"]
    b: Float[Tensor, "groups r d_out"]
    read: tuple[dict[str, Any], ...]
    stamps: list[tuple[int, int]] | None
    """What `_stamps` said of the factors; None where it cannot tell, and nothing is kept."""

    @classmethod
    def of(
        cls, names: tuple[str, ...], factors: Sequence[Factors | None], x: Tensor
    ) -> FactorStack:
        """The stack on x's device, in the type of its products, scalings folded in."""
        dtype = _multiplied(x)
        present = [each for each in factors if each is not None]
        ranks = [each.lora_A.shape[0] for each in present]
        d_in, d_out = x.shape[-1], present[0].lora_B.shape[0] if present else 0
        a = x.new_zeros(len(names), d_in, max(ranks, default=0), dtype=dtype)
        b = x.new_zeros(len(names), max(ranks, default=0), d_out, dtype=dtype)
        for group, each in enumerate(factors):
            if each is not None:
                r = each.lora_A.shape[0]
                a[group, :, :r] = each.lora_A.to(dtype).T
                b[group, :r] = each.lora_B.to(dtype).T * each.scaling
        read = tuple(each._parameters for each in present)
        told = not any(t.is_inference() for parameters in read for t in parameters.values())
        return cls(names, a, b, read, _stamps(read) if told else None)

    def serves(self, names: tuple[str, ...], x: Tensor) -> bool:
        """Whether these are the adapters asked for, and their factors as they were."""
        a = self.a
        return (
            names == self.names
            and a.dtype == _multiplied(x)
            and a.device == x.device
            and self.stamps is not None
            and self.stamps == _stamps(self.read)
        )

    def add_to(
        self, y: Float[Tensor, "*rows d_out"], x: Float[Tensor, "*rows d_in"], mixture: Mixture
    ) -> None:
        """Add to each token of y its adapter's update; x and y are one flat row of tokens."""
        if not self.read:
            return
        groups, d_in, _ = self.a.shape
        if mixture.bare or mixture.back is not None:
            x, y = x.reshape(-1, d_in), y.view(-1, y.shape[-1])
        if mixture.gather is None or mixture.back is None:
            if mixture.bare:
                x, y = x[mixture.bare :], y[mixture.bare :]
            rows = x.reshape(groups, mixture.most, d_in).to(self.a.dtype)
            low, places = torch.bmm(rows, self.a), y.view(groups, mixture.most, -1)
            if y.dtype == low.dtype:
                places.baddbmm_(low, self.b)
            else:
                places.add_(torch.bmm(low, self.b))
            return
        gathered = x.index_select(0, mixture.gather).view(groups, mixture.most, d_in)
        gathered = gathered.to(self.a.dtype)
        places = torch.bmm(torch.bmm(gathered, self.a), self.b).view(-1, y.shape[1])
        y[mixture.bare :].add_(places.index_select(0, mixture.back))


def _multiplied(x: Tensor) -> torch.dtype:
    """The type of the stacked products for rows like x: small ones of bf16 take twice as long as
    those of float32 on a CPU."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


def _stamps(read: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """What differs after a step, a load or a move of any of these factors: where it stands and
    how often it was written."""
    return [(t.data_ptr(), t._version) for parameters in read for t in parameters.values()]
