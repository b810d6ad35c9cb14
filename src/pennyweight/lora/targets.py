"""Which modules of a base an adapter stands beside: `all-linear`, `attention`, `mlp`, a list, a pattern."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from pennyweight.config import LoraConfig
from pennyweight.errors import AdapterError
from pennyweight.lora.layer import AdaptedModule
from pennyweight.patterns import pattern

__all__ = ["alpha_of", "ends_with", "linear_modules", "rank_of", "target_names", "targets"]

Number = TypeVar("Number", int, float)

ATTENTION = re.compile(r"(^|\.)(\w*attn\w*|\w*attention\w*)(\.|$)")
MLP = re.compile(r"(^|\.)(\w*mlp\w*|\w*ffn\w*|\w*feed_forward\w*)(\.|$)")


def linear_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Every linear-like layer by full name: plain, quantized, Conv1D; what stands under an adapter counts once."""
    found: dict[str, nn.Module] = {}
    for name, layer in module.named_modules():
        if ".base_layer" in name or ".adapters." in name:
            continue
        plain = layer.base_layer if isinstance(layer, AdaptedModule) else layer
        if isinstance(plain, nn.Linear) or type(plain).__name__ in ("Conv1D", "QuantizedLinear"):
            found[name] = layer
    return found


def targets(
    names: Iterable[str], spec: str | Sequence[str], *, head: str | None
) -> tuple[str, ...]:
    """The names that `spec` matches, in the order given.

    `all-linear` is every one but the output `head`; `attention` and `mlp` those inside such a
    block; another string is a regular expression over the whole name; a list names modules by
    their last parts (`q_proj`, `mlp.c_proj`). Whatever matches nothing is refused, with the
    nearest names.
    """
    every = list(names)
    inner = [n for n in every if n != head]
    if isinstance(spec, str):
        return _by_pattern(inner, every, spec)
    faults = [_nothing(t, every) for t in spec if not any(ends_with(n, t) for n in every)]
    if faults or not spec:
        raise AdapterError.all(
            faults or ["adapter.target_modules is an empty list; `all-linear` is the usual choice"]
        )
    return tuple(n for n in every if any(ends_with(n, t) for t in spec))


def _by_pattern(inner: list[str], every: list[str], spec: str) -> tuple[str, ...]:
    known = {"all-linear": re.compile(""), "attention": ATTENTION, "mlp": MLP}
    if spec in known:
        chosen = tuple(n for n in inner if known[spec].search(n))
    else:
        wanted = pattern(spec)
        chosen = tuple(n for n in every if wanted.fullmatch(n))
    if not chosen:
        raise AdapterError(_nothing(spec, every))
    return chosen


def target_names(chosen: Sequence[str], every: Sequence[str]) -> list[str]:
    """The shortest list that means `chosen` to PEFT: last names where they suffice, else full names."""
    leaves = sorted({n.rpartition(".")[2] for n in chosen})
    if {n for n in every if any(ends_with(n, leaf) for leaf in leaves)} == set(chosen):
        return leaves
    return sorted(chosen)


def rank_of(name: str, config: LoraConfig) -> int:
    """The rank at one module: the first `rank_pattern` key that matches, else `r`."""
    return _patterned(name, config.rank_pattern, config.r)


def alpha_of(name: str, config: LoraConfig) -> float:
    """The alpha at one module: the first `alpha_pattern` key that matches, else `lora_alpha`."""
    return float(_patterned(name, config.alpha_pattern, float(config.lora_alpha)))


def _patterned(name: str, patterns: Mapping[str, Number], default: Number) -> Number:
    for key, value in patterns.items():
        if ends_with(name, key) or pattern(rf"(.*\.)?({key})").fullmatch(name):
            return value
    return default


def ends_with(name: str, target: str) -> bool:
    """Whether `target` is the whole name or its last parts."""
    return name == target or name.endswith("." + target)


def _nothing(spec: str, every: Sequence[str]) -> str:
    leaves = sorted({n.rpartition(".")[2] for n in every})
    near = difflib.get_close_matches(spec.rpartition(".")[2], leaves, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"the linear modules are {', '.join(leaves)}"
    )
    return f"adapter.target_modules: {spec!r} matches no linear module of this base; {hint}"
