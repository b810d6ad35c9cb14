"""A decoder layer's attention around `attend`: projections, rotary positions and the layer after it.

What it computes is what transformers' module of the same parts computes with `attend` registered;
standing in for the whole module is how queries and keys are turned by a kernel of our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from pennyweight.attention import attend
from pennyweight.blocks.rotation import rotate
from pennyweight.lora.abreast import abreast
from pennyweight.route import Route

__all__ = ["SelfAttention"]


class SelfAttention(nn.Module):
    """o(attend(rotate(q x), rotate(k x), v x)), its layers under the names their model gave them.

    `q_norm` and `k_norm` of each head come before the rotation, where the model has them (Qwen3).
    `layer_idx` is the layer's place in the memory of keys and values.
    """

    pennyweight_route: Route

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        *,
        head_dim: int,
        layer_idx: int,
        scaling: float,
        sliding_window: int | None,
        softcap: float | None,
        is_causal: bool,
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.head_dim, self.layer_idx, self.scaling = head_dim, layer_idx, scaling
        self.sliding_window, self.softcap, self.is_causal = sliding_window, softcap, is_causal

    def forward(
        self,
        hidden_states: Float[Tensor, "1 tokens d"],
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **passed_on: Any,
    ) -> tuple[Float[Tensor, "1 tokens d"], None]:
        projections = [self.get_submodule(f"{of}_proj") for of in "qkv"]
        query, key, value = map(self._heads, abreast(projections, hidden_states), "qkv")
        query, key = rotate(query, key, *position_embeddings)
        mixed, _ = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            **passed_on,
        )
        (out,) = abreast([cast(nn.Module, self.o_proj)], mixed.flatten(-2))
        return out, None

    def _heads(self, projected: Tensor, of: str) -> Float[Tensor, "1 heads tokens head_dim"]:
        heads = projected.view(*projected.shape[:-1], -1, self.head_dim)
        norm = self._modules.get(f"{of}_norm")
        return (heads if norm is None else norm(heads)).transpose(1, 2)
