"""Token embeddings that stay in host memory: rows are looked up there and sent to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

__all__ = ["HostEmbedding"]


class HostEmbedding(nn.Module):
    """A frozen table `[vocab, d]` that `.to(device)` leaves where it is; dtypes change as ever.

    A pass sends d numbers a token, 8 KB in 16 bits at d = 4,096, in place of holding the table.
    """

    weight: nn.Parameter

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = cast(nn.Parameter, embedding.weight)
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.padding_idx = embedding.padding_idx

    def forward(self, ids: Int64[Tensor, "*rows"]) -> Float[Tensor, "*rows d"]:
        return F.embedding(ids.to(self.weight.device), self.weight).to(ids.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostEmbedding:
        def stay(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.device == tensor.device else tensor.to(moved.dtype)

        super()._apply(stay, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, in host memory"
