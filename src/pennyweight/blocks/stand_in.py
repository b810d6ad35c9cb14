"""Our norms and feed-forwards in the places of a model's own, where they compute the same.

They are modules of the model like any other, with the weights and under the names that it had;
which of transformers' classes they stand in for is listed here, and nothing else is touched.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from pennyweight.blocks.feed_forward import ACTIVATIONS, GatedFeedForward
from pennyweight.blocks.norm import RMSNorm

__all__ = ["stand_in"]

_NORMS = {f"{family}RMSNorm" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3")}
_WIDE_NORMS = {"Gemma2RMSNorm", "Gemma3RMSNorm"}
_FEED_FORWARDS = {f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "StableLm")}
_NORMED_FEED_FORWARDS = {"Gemma2MLP", "Gemma3MLP"}
_MERGED_FEED_FORWARDS = {"Phi3MLP"}


def stand_in(module: nn.Module) -> None:
    """Put them in place; weights are taken over, not copied."""
    for path, layer in list(module.named_modules()):
        mine = _norm(layer) or _feed_forward(layer)
        if mine is not None:
            module.set_submodule(path, mine.train(layer.training))


def _norm(layer: nn.Module) -> RMSNorm | None:
    kind = type(layer).__name__
    if kind not in _NORMS | _WIDE_NORMS:
        return None
    eps = getattr(layer, "variance_epsilon", None) or cast(float, layer.eps)
    return RMSNorm(cast(nn.Parameter, layer.weight), float(eps), wide_weight=kind in _WIDE_NORMS)


def _feed_forward(layer: nn.Module) -> GatedFeedForward | None:
    kind = type(layer).__name__
    if kind not in _FEED_FORWARDS | _NORMED_FEED_FORWARDS | _MERGED_FEED_FORWARDS:
        return None
    config = layer.config
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in ACTIVATIONS:
        return None
    names = ("gate_up_proj", "down_proj")
    if kind not in _MERGED_FEED_FORWARDS:
        names = ("gate_proj", "up_proj", "down_proj")  # type: ignore[assignment]
    layers = {name: layer.get_submodule(name) for name in names}
    return GatedFeedForward(layers, str(activation), kept_after=kind in _NORMED_FEED_FORWARDS)
