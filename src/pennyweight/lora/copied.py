"""Trained copies of whole frozen modules, one an adapter: embeddings, heads, norms."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from pennyweight.lora.layer import AdaptedModule

__all__ = ["CopiedWeight", "TrainedCopy"]


class CopiedWeight(nn.Module):
    """One adapter's float32 copy of a module's weight; tied modules share the parameter."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class TrainedCopy(AdaptedModule):
    """A frozen module (embedding, head, norm) and full trained copies of its weight, one an adapter."""

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, self.base_layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        axis = -1 if isinstance(self.base_layer, nn.Embedding) else -2
        parts = [
            self._run(x.narrow(axis, start, stop - start), name)
            for name, start, stop in self.runs(x.shape[axis])
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def _run(self, x: Tensor, name: str | None) -> Tensor:
        if name is None or name not in self:
            return cast(Tensor, self.base_layer(x))
        weight = cast(Tensor, self.of(name).weight).to(self.weight.dtype)
        return cast(Tensor, torch.func.functional_call(self.base_layer, {"weight": weight}, (x,)))
