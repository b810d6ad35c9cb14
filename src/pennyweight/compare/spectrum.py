"""How much of its rank an adapter uses: singular values of B·A and their effective rank.

With B = Q_B R_B and Aᵀ = Q_A R_A, B·A = Q_B (R_B R_Aᵀ) Q_Aᵀ has the singular values of its r x r core;
the product `[out, in]` itself is never formed. Effective rank: Roy & Vetterli 2007, the exponential
of the entropy of the singular values as shares of their sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pennyweight.lora import Adapter

__all__ = ["effective_rank", "singular_values", "spectra"]


def singular_values(a: Float[Tensor, "r d_in"], b: Float[Tensor, "d_out r"]) -> Float[Tensor, " k"]:
    """Singular values of B·A, largest first, in float64; k = min(r, d_in, d_out)."""
    left = torch.linalg.qr(b.double()).R
    right = torch.linalg.qr(a.double().T).R
    values = torch.linalg.svdvals(left @ right.T)
    return values[: min(*a.shape, b.shape[0])]


def effective_rank(values: Sequence[float]) -> float:
    """From 1, all in one direction, to `len(values)`, all alike; 0 where nothing was learned."""
    total = math.fsum(values)
    if total <= 0:
        return 0.0
    shares = [value / total for value in values if value > 0]
    return math.exp(-math.fsum(share * math.log(share) for share in shares))


def spectra(adapter: Adapter) -> Mapping[str, list[float]]:
    """Singular values of scaling · B·A by module, in the order of the model."""
    return {
        module: (singular_values(a.cpu(), b.cpu()) * adapter.scaling(module)).tolist()
        for module, (a, b) in adapter.factors.items()
    }
