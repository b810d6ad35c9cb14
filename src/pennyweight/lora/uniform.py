"""An adapter of one rank and one plain scaling, which says the same: what every server reads.

Servers take `lora_alpha / r` for all modules and pass over rsLoRA and patterns (docs/registry.md says
which does what). A rank is filled up with zeros, and a scaling of its own goes into B.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

from pennyweight.lora.adapter import Adapter

__all__ = ["uniform"]


def uniform(adapter: Adapter) -> Adapter:
    """The same update from one rank, with alpha over rank as the only scaling.

    The scaling most modules have becomes the common one, and their numbers stay as they are; the
    others' B is multiplied once, in float32.
    """
    if not adapter.factors:
        return adapter
    rank = max(a.shape[0] for a, _ in adapter.factors.values())
    scalings = {module: adapter.scaling(module) for module in adapter.factors}
    common = Counter(scalings.values()).most_common(1)[0][0]
    factors = {
        module: (_filled(a, rank, 0), _filled(_scaled(b, scalings[module] / common), rank, 1))
        for module, (a, b) in adapter.factors.items()
    }
    plain = {"r": rank, "lora_alpha": common * rank, "use_rslora": False}
    config = adapter.config.model_copy(update={**plain, "rank_pattern": {}, "alpha_pattern": {}})
    return replace(adapter, config=config, factors=factors)


def _scaled(factor: Tensor, times: float) -> Tensor:
    return factor if times == 1 else (factor.double() * times).float()


def _filled(factor: Tensor, rank: int, dimension: int) -> Tensor:
    """Zeros added until `dimension` has `rank` entries."""
    more = rank - factor.shape[dimension]
    if not more:
        return factor
    shape = [more if i == dimension else size for i, size in enumerate(factor.shape)]
    return torch.cat((factor, factor.new_zeros(shape)), dim=dimension)
