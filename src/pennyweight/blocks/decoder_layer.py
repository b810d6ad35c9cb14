"""A whole decoder layer, x + attention(norm x) and then x + feed_forward(norm x), as one function of
autograd and one call into a CPU's kernels each way, where they do every part of it.

Between the kernels of a short pass Python takes as long as some of them. What is computed, and what is
kept for backward, is what the parts compute and keep one by one, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pennyweight.attention import attends_in_one_call
from pennyweight.blocks.feed_forward import GatedFeedForward
from pennyweight.blocks.kernels import serving
from pennyweight.blocks.kernels.compiled_layer import LAYERS, FrozenNorm, WholeLayer
from pennyweight.blocks.norm import RMSNorm
from pennyweight.blocks.self_attention import SelfAttention
from pennyweight.lora.abreast import along_of
from pennyweight.lora.along import Along

__all__ = ["DecoderLayer"]

# What models hand to their layers, and ours have no use for.
_UNREAD: Final = {"position_ids", "past_key_values", "use_cache", "cache_position"}


class DecoderLayer(nn.Module):
    """Its parts, under the names their model gave them; it can be computed again for backward, as
    transformers' layers can."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __init__(
        self,
        input_layernorm: nn.Module,
        self_attn: nn.Module,
        post_attention_layernorm: nn.Module,
        mlp: nn.Module,
    ) -> None:
        super().__init__()
        self.self_attn, self.mlp = self_attn, mlp
        self.input_layernorm = input_layernorm
        self.post_attention_layernorm = post_attention_layernorm

    def forward(
        self, hidden_states: Float[Tensor, "1 tokens d"], **given: Any
    ) -> Float[Tensor, "1 tokens d"]:
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(
                partial(self._by_parts, **given), hidden_states
            )
        if torch.is_grad_enabled() and (whole := self._whole(hidden_states, **given)) is not None:
            cos, sin = given["position_embeddings"]
            ends = cast(SelfAttention, self.self_attn).pennyweight_route.boundaries
            made = _Whole.apply(hidden_states, cos, sin, whole, ends, *whole.masters)
            return cast(Tensor, made)
        return self._by_parts(hidden_states, **given)

    def _by_parts(
        self,
        x: Float[Tensor, "1 tokens d"],
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **passed_on: Any,
    ) -> Float[Tensor, "1 tokens d"]:
        mixed, _ = self.self_attn(
            hidden_states=self.input_layernorm(x),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **passed_on,
        )
        x = x + mixed
        return x + cast(Tensor, self.mlp(self.post_attention_layernorm(x)))

    def _whole(
        self,
        x: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **passed_on: Any,
    ) -> WholeLayer | None:
        """The layer for one call each way; None where a part of it is not a kernel's."""
        attention, feed_forward = self.self_attn, self.mlp
        if (
            x.dtype != torch.float32
            or attention_mask is not None
            or not passed_on.keys() <= _UNREAD
        ):
            return None
        # What is trained whole has another module around it.
        if type(attention) is not SelfAttention or type(feed_forward) is not GatedFeedForward:
            return None
        norms = [
            _frozen_norm(self.input_layernorm, x),
            _frozen_norm(self.post_attention_layernorm, x),
        ]
        parts = {**attention._modules, **feed_forward._modules}
        if (
            None in norms
            or parts.keys() != set(LAYERS)
            or any(map(_watched, self._modules.values()))
        ):
            return None
        cos, sin = position_embeddings
        like = cos[:, None]
        turned = cos.shape == (*x.shape[:-1], attention.head_dim) and cos.dtype == x.dtype
        if not turned or serving("rotation", like, like, cos, sin) is None:
            return None
        if not attends_in_one_call(attention, like, attention.sliding_window, attention.softcap):
            return None
        if feed_forward.kernel(x, x) is None or feed_forward.left_out:
            return None
        if (along := along_of([cast(nn.Module, parts[name]) for name in LAYERS], x)) is None:
            return None
        if any(layer.bias is not None for layer in along.layers):
            return None
        # Where nothing in or before attention is trained its parts keep nothing.
        of_attention = Along(along.kernels, along.layers[: LAYERS.index("gate_proj")]).masters
        if not x.requires_grad and not any(master.requires_grad for master in of_attention):
            return None
        return WholeLayer.of(
            along.kernels,
            along.layers,
            cast(list[FrozenNorm], norms),
            head_width=attention.head_dim,
            scaling=attention.scaling,
        )


class _Whole(torch.autograd.Function):
    """All of a layer by two calls."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        whole: WholeLayer,
        ends: tuple[int, ...],
        *masters: Tensor,
    ) -> Tensor:
        y, kept = whole.passed(x, cos, sin, ends)
        ctx.whole, ctx.ends = whole, ends
        ctx.save_for_backward(x, cos, sin, kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_masters = ctx.whole.back(
            grad_y, *ctx.saved_tensors, ctx.ends, of_x=ctx.needs_input_grad[0]
        )
        return of_x, None, None, None, None, *of_masters


def _frozen_norm(norm: nn.Module, x: Tensor) -> FrozenNorm | None:
    """The norm, if a kernel does it and its weight is not trained."""
    if type(norm) is not RMSNorm or norm.weight.requires_grad:
        return None
    if serving("norm", x, norm.weight) is None:
        return None
    return FrozenNorm(norm.weight, norm.eps, norm.wide_weight)


def _watched(part: nn.Module | None) -> bool:
    """Whether somebody asked to see what goes in or out of it."""
    assert part is not None
    hooks = (part._forward_hooks, part._forward_pre_hooks)
    return any((*hooks, part._backward_hooks, part._backward_pre_hooks))
