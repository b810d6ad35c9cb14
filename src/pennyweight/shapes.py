"""A model as its shapes alone: every parameter's name, size and role, and no weight.

All that a prediction needs. `pennyweight.model.shapes` reads one from any `config.json`;
`dense_shapes` and `shapes_of_config` make one for the plain decoders that most people tune,
without a library that knows model classes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

__all__ = [
    "Kind",
    "Parameter",
    "Shapes",
    "dense_shapes",
    "is_hub_id",
    "shapes_of_config",
    "size_faults",
]

Kind = Literal["linear", "embedding", "head", "norm", "bias", "other"]

_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One tensor of a model; a linear weight is `(d_out, d_in)`, whatever the file's own order."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    tied_to: str | None = None

    @property
    def elements(self) -> int:
        """Numbers it holds; a tied one holds none of its own."""
        return 0 if self.tied_to else math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        """Index of the decoder layer it belongs to, or None."""
        found = _LAYER.search(self.name)
        return int(found.group(1)) if found else None

    @property
    def module(self) -> str:
        """Full name of the module that owns it."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Shapes:
    """A decoder's sizes. `activation` is transformers' name; `gated` means gate * up (SwiGLU);
    `softcap` that attention bounds its scores (Gemma 2)."""

    name: str
    parameters: tuple[Parameter, ...]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    gated: bool = True
    activation: str = "silu"
    softcap: bool = False

    @cached_property
    def count(self) -> int:
        """Parameters in all, tied ones once."""
        return sum(p.elements for p in self.parameters)

    @cached_property
    def linears(self) -> tuple[Parameter, ...]:
        """Weights of the linear layers, the output head apart."""
        return tuple(p for p in self.parameters if p.kind == "linear")

    @cached_property
    def by_layer(self) -> tuple[tuple[Parameter, ...], ...]:
        """Parameters of each decoder layer, in order."""
        rows: dict[int, list[Parameter]] = {}
        for parameter in self.parameters:
            if parameter.layer is not None:
                rows.setdefault(parameter.layer, []).append(parameter)
        return tuple(tuple(rows[index]) for index in sorted(rows))

    @property
    def head_elements(self) -> int:
        """Multiplications of the output head for one token, tied or not."""
        return self.vocab * self.hidden


def dense_shapes(
    name: str,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    vocab: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    max_positions: int = 4096,
    tied: bool = False,
    qk_norm: bool = False,
    qkv_bias: bool = False,
    activation: str = "silu",
) -> Shapes:
    """A decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3) from the numbers of its card.

    >>> dense_shapes("tiny", layers=1, hidden=8, intermediate=16, heads=2, vocab=10).count
    824
    """
    kv = kv_heads or heads
    width = head_dim or hidden // heads
    rows: list[Parameter] = [Parameter("model.embed_tokens.weight", (vocab, hidden), "embedding")]
    projections = {
        "self_attn.q_proj": (heads * width, hidden),
        "self_attn.k_proj": (kv * width, hidden),
        "self_attn.v_proj": (kv * width, hidden),
        "self_attn.o_proj": (hidden, heads * width),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if qk_norm:
        norms |= {"self_attn.q_norm": width, "self_attn.k_norm": width}
    for index in range(layers):
        place = f"model.layers.{index}"
        for leaf, shape in projections.items():
            rows.append(Parameter(f"{place}.{leaf}.weight", shape, "linear"))
            if qkv_bias and leaf.endswith(("q_proj", "k_proj", "v_proj")):
                rows.append(Parameter(f"{place}.{leaf}.bias", shape[:1], "bias"))
        rows += [Parameter(f"{place}.{leaf}.weight", (n,), "norm") for leaf, n in norms.items()]
    rows.append(Parameter("model.norm.weight", (hidden,), "norm"))
    twin = "model.embed_tokens.weight" if tied else None
    rows.append(Parameter("lm_head.weight", (vocab, hidden), "head", twin))
    return Shapes(
        name=name,
        parameters=tuple(rows),
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv,
        head_dim=width,
        vocab=vocab,
        max_positions=max_positions,
        activation=activation,
    )


# Setting -> the largest value; far beyond any model there is, and small enough to be computed with.
_LARGEST = {
    **dict.fromkeys(("vocab_size",), 2**24),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size"), 2**18),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "d_ff"), 2**21),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2**11),
    **dict.fromkeys(("decoder_layers", "encoder_layers"), 2**11),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "head_dim"), 2**14),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 2**28),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 2**12),
}
_LARGEST_NUMBER, _LONGEST_LIST = 2**53, 100_000
_HUB_ID = re.compile(
    r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(@[A-Za-z0-9_][\w.-]*(/[\w][\w.-]*)*)?"
)


def is_hub_id(name: str) -> bool:
    """`owner/name` or `owner/name@revision`, of characters that lead out of no folder."""
    return _HUB_ID.fullmatch(name) is not None and ".." not in name and len(name) < 300


def size_faults(config: Mapping[str, Any], inside: str = "") -> list[str]:
    """Sizes in a `config.json` that no model has, so that nothing is computed or allocated by them."""
    faults = []
    for key, value in config.items():
        here, most = f"{inside}{key}"[:80], _LARGEST.get(key)
        values = value if isinstance(value, list) else [value]
        if len(values) > _LONGEST_LIST:
            faults.append(f"{here}: a list of {len(values):,}")
        if most is not None and (isinstance(value, dict) or value == []):
            faults.append(f"{here}: found {str(value)[:40]}, expected 1 to {most:,}")
        for each in values[:_LONGEST_LIST]:
            if isinstance(each, dict):
                faults += size_faults(each, f"{here}.")
            elif most is not None and each is not None:
                if type(each) is not int or not 1 <= each <= most:
                    faults.append(f"{here}: found {str(each)[:40]}, expected 1 to {most:,}")
            elif isinstance(each, int | float) and not abs(each) <= _LARGEST_NUMBER:
                faults.append(f"{here}: found {str(each)[:40]}, which no model needs")
    return faults


_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "hidden_act",
)
_PLAIN = ("llama", "mistral", "qwen2", "qwen3")


def shapes_of_config(name: str, config: Mapping[str, Any]) -> Shapes | None:
    """Shapes of the model that this `config.json` describes, or None where it takes the library.

    Known are Llama, Mistral, Qwen2 and Qwen3 with every size written down.
    """
    family = config.get("model_type")
    unusual = "auto_map" in config or config.get("attention_bias") or config.get("mlp_bias")
    if family not in _PLAIN or unusual or any(config.get(key) is None for key in _NEEDED):
        return None
    if any(type(config[key]) is not int for key in _NEEDED if key != "hidden_act"):
        return None  # a size a layer, which the library reads
    width = config.get("head_dim")
    if family == "qwen3" and width is None:
        return None  # not hidden / heads there
    return dense_shapes(
        name,
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=width,
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qk_norm=family == "qwen3",
        qkv_bias=family == "qwen2",
        activation=config["hidden_act"],
    )
