"""Our norms, attention and feed-forwards in the places of a model's own, where they compute the same.

They are modules of the model like any other, with the weights and under the names that it had;
which of transformers' classes they stand in for is listed here, and nothing else is touched.
"""

from __future__ import annotations

from typing import cast

from torch import nn

from pennyweight.blocks.decoder_layer import DecoderLayer
from pennyweight.blocks.feed_forward import ACTIVATIONS, GatedFeedForward
from pennyweight.blocks.norm import RMSNorm
from pennyweight.blocks.self_attention import SelfAttention

__all__ = ["stand_in"]

_NORMS = {f"{family}RMSNorm" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3")}
_WIDE_NORMS = {"Gemma2RMSNorm", "Gemma3RMSNorm"}
_FEED_FORWARDS = {f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "StableLm")}
_NORMED_FEED_FORWARDS = {"Gemma2MLP", "Gemma3MLP"}
_MERGED_FEED_FORWARDS = {"Phi3MLP"}
_ATTENTIONS = {
    f"{family}Attention" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3")
}
_LAYERS = {f"{family}DecoderLayer" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")}
_OF_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
_OF_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def stand_in(module: nn.Module) -> None:
    """Put them in place; weights are taken over, not copied."""
    for path, layer in list(module.named_modules()):
        mine = _norm(layer) or _feed_forward(layer) or _attention(layer)
        if mine is not None:
            module.set_submodule(path, mine.train(layer.training))
    for path, layer in list(module.named_modules()):
        if (whole := _decoder_layer(layer)) is not None:
            module.set_submodule(path, whole.train(layer.training))


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


def _attention(layer: nn.Module) -> SelfAttention | None:
    kind, layers = type(layer).__name__, dict(layer.named_children())
    if kind not in _ATTENTIONS or not layers.keys() >= _OF_ATTENTION:
        return None
    # Mistral's window is the config's for every layer; the others name each layer's own, or none.
    windowed = layer.config if kind == "MistralAttention" else layer
    return SelfAttention(
        layers,
        head_dim=cast(int, layer.head_dim),
        layer_idx=cast(int, layer.layer_idx),
        scaling=cast(float, layer.scaling),
        sliding_window=getattr(windowed, "sliding_window", None),
        softcap=getattr(layer, "attn_logit_softcapping", None)
        if kind == "Gemma2Attention"
        else None,
        is_causal=bool(getattr(layer, "is_causal", True)),
    )


def _decoder_layer(layer: nn.Module) -> DecoderLayer | None:
    parts = dict(layer.named_children())
    if type(layer).__name__ not in _LAYERS or parts.keys() != _OF_LAYER:
        return None
    whole = DecoderLayer(**parts)
    # By which some releases of transformers choose a layer's mask.
    if (kind := getattr(layer, "attention_type", None)) is not None:
        whole.attention_type = kind
    return whole
