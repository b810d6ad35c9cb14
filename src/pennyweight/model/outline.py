"""A model's shapes, read from its config alone; no weight is touched."""

from __future__ import annotations

import torch
from torch import nn

from pennyweight.lora.layer import linear_shape
from pennyweight.model.folder import find_folder, read_config
from pennyweight.model.load import outlined, register
from pennyweight.shapes import Kind, Parameter, Shapes

__all__ = ["shapes"]


def shapes(name: str) -> Shapes:
    """Every parameter's name, size and role, read from `config.json` alone; no weight is touched."""
    register()
    config = read_config(find_folder(name, weights=False))
    with torch.device("meta"):
        module = outlined(config)
    head = module.get_output_embeddings()
    embedding = module.get_input_embeddings()
    text = config.get_text_config(decoder=True)
    tied = head.weight is embedding.weight or bool(getattr(text, "tie_word_embeddings", False))
    rows = []
    for path, layer in module.named_modules():
        for leaf, parameter in layer.named_parameters(recurse=False):
            full = f"{path}.{leaf}"
            twin = _path_of(module, embedding) + ".weight" if tied and layer is head else None
            kind = _kind(layer, leaf, head, embedding)
            linear = kind == "linear"
            rows.append(
                Parameter(
                    full, linear_shape(layer) if linear else tuple(parameter.shape), kind, twin
                )
            )
    if tied and not any(row.kind == "head" for row in rows):
        twin = _path_of(module, embedding) + ".weight"
        rows.append(
            Parameter(_path_of(module, head) + ".weight", tuple(head.weight.shape), "head", twin)
        )
    heads = int(text.num_attention_heads)
    activation = str(
        getattr(text, "hidden_act", None)
        or getattr(text, "hidden_activation", None)
        or getattr(text, "activation_function", "silu")
    )
    return Shapes(
        name=name,
        parameters=tuple(rows),
        layers=int(text.num_hidden_layers),
        hidden=int(text.hidden_size),
        intermediate=int(
            getattr(text, "intermediate_size", None)
            or getattr(text, "n_inner", None)
            or 4 * text.hidden_size
        ),
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        vocab=int(text.vocab_size),
        max_positions=int(getattr(text, "max_position_embeddings", 2**31)),
        gated=any("gate" in row.name for row in rows),
        activation=activation,
        softcap=bool(getattr(text, "attn_logit_softcapping", None)),
    )


def _kind(layer: nn.Module, leaf: str, head: nn.Module, embedding: nn.Module) -> Kind:
    if leaf == "bias":
        return "bias"
    if layer is head:
        return "head"
    if layer is embedding or isinstance(layer, nn.Embedding):
        return "embedding"
    if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
        return "linear"
    return "norm" if "norm" in type(layer).__name__.lower() else "other"


def _path_of(module: nn.Module, part: nn.Module) -> str:
    return next(path for path, found in module.named_modules() if found is part)
