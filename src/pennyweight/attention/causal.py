"""Causal attention over one flat row of documents, on every backend.

softmax(scale * q k^T) v (Attention Is All You Need, section 3.2.1), where a token sees the
tokens of its own document up to itself, and no further back than a sliding window (Mistral 7B,
section 2). `attend` has the signature that transformers' `AttentionInterface` calls; which
tokens form a document it reads from the `Route` beside the model.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pennyweight.attention import compiled
from pennyweight.attention.cache import Abreast
from pennyweight.errors import ModelError
from pennyweight.route import Route

__all__ = ["attend", "attends_in_one_call"]

# Queries taken at once where keys out of sight can be left out: small enough to skip most of
# what is masked, large enough to keep the products busy.
BLOCK_QUERIES = 256

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class _Rule:
    """How one layer attends: its scale, window in tokens, score cap, and written out or fused."""

    scale: float
    window: int | None
    softcap: float | None
    explicit: bool


def attend(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens value_dim"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **passed_on: Any,
) -> tuple[Float[Tensor, "1 tokens heads value_dim"], None]:
    """Attention of each token to its own document, of every document on the module's route.

    With `route.cache`, the new keys and values are written to it first and each document
    continues the row it names there; this write is the one exception to "forward never writes".
    Raises ModelError for a model that asks for another attention than causal.
    """
    _refuse_what_is_not_causal(module, attention_mask, dropout, passed_on)
    route = module.pennyweight_route
    assert isinstance(route, Route), "model.py puts the route on every attention module"
    assert (query.shape[0], query.shape[2]) == (1, route.boundaries[-1]), (
        f"{tuple(query.shape)} is not one flat row over the route's {route.boundaries}"
    )
    if torch.is_autocast_enabled(query.device.type):
        # Rotation leaves queries and keys wider than values; all go in the type of the products.
        narrow = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    rule = _Rule(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        explicit=softcap is not None or route.backend == "eager",
    )
    if route.cache is None:
        mixed = _attend_documents(query, key, value, rule, route)
    else:
        mixed = _attend_remembered(query, key, value, rule, route, cast(int, module.layer_idx))
    return mixed.transpose(1, 2).contiguous(), None


def attends_in_one_call(
    module: nn.Module,
    like: Float[Tensor, "1 _ tokens d"],
    window: int | None,
    softcap: float | None,
) -> bool:
    """Whether `attend` of such rows is one call of the compiled kernel each way, and nothing else."""
    route = module.pennyweight_route
    assert isinstance(route, Route)
    if route.cache is not None or getattr(module, "is_causal", True) is False:
        return False
    if (like.shape[0], like.shape[2]) != (1, route.boundaries[-1]):
        return False
    rule = _Rule(1.0, window, softcap, softcap is not None or route.backend == "eager")
    longest = max(b - a for a, b in pairwise(route.boundaries))
    if _backend(like, rule, route.backend) != "documents":
        return False
    return _by_torchs_cpu_kernel(like, like, rule, longest) and compiled.serves(like, like, like)


def _refuse_what_is_not_causal(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, passed_on: dict[str, Any]
) -> None:
    """What would change the numbers and is not done here must not be dropped in silence."""
    faults = [
        f"{type(module).__name__} passes {name!r} to its attention; only causal attention with "
        "scale, sliding window and soft cap is known here: choose another base model"
        for name in ("s_aux", "position_bias", "head_mask")
        if passed_on.get(name) is not None
    ]
    if passed_on.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        faults.append(
            f"{type(module).__name__} attends in both directions; choose a causal language model"
        )
    if dropout:
        faults.append(
            f"{type(module).__name__} drops attention with probability {dropout}; a base runs in "
            "eval mode, where it is 0: call `module.eval()`"
        )
    if faults:
        raise ModelError.all(faults)
    assert attention_mask is None, "documents come from the route, not from a mask"


def _attend_documents(
    query: Tensor, key: Tensor, value: Tensor, rule: _Rule, route: Route
) -> Float[Tensor, "1 heads tokens value_dim"]:
    """Each document over itself, by the backend the route names."""
    backend = _backend(query, rule, route.backend)
    if backend == "masked":
        visible = _block_diagonal(route.boundaries, rule.window, query.device)
        return _fused(query, key, value, rule.scale, visible)
    if backend == "varlen":
        return _attend_varlen(query, key, value, rule, route.boundaries)
    longest = max(b - a for a, b in pairwise(route.boundaries))
    if _by_torchs_cpu_kernel(query, value, rule, longest):
        joined: Tensor = _Documents.apply(query, key, value, route.boundaries, rule.scale)
        return joined
    # split, not slices: its backward is one concatenation, where each slice would fill a row.
    counts = [b - a for a, b in pairwise(route.boundaries)]
    parts = zip(*(torch.split(each, counts, 2) for each in (query, key, value)), strict=True)
    return _join([_causal(q, k, v, rule) for q, k, v in parts])


def _backend(query: Tensor, rule: _Rule, asked: str) -> str:
    """`documents`, `masked` or `varlen`; written-out attention always goes by documents."""
    if rule.explicit:
        return "documents"
    fits = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    if asked == "varlen" and not (fits and _varlen() is not None):
        raise ModelError(
            f"attention `varlen` needs bfloat16 or float16 on CUDA and its kernel in torch; found "
            f"{query.dtype} on {query.device.type}: set base.attention to `auto`"
        )
    if asked == "auto":
        return "varlen" if fits and query.shape[-1] <= 256 and _varlen() else "documents"
    return asked


def _by_torchs_cpu_kernel(query: Tensor, value: Tensor, rule: _Rule, longest: int) -> bool:
    """Whether the kernel that `scaled_dot_product_attention` takes on a CPU does it all."""
    seen_whole = rule.window is None or rule.window >= longest
    alike = query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and not rule.explicit and seen_whole and alike


class _Documents(torch.autograd.Function):
    """Each document over itself by a CPU kernel, ours or torch's, all of them into one row.

    Through autograd's own operations the outputs would be kept for backward one by one, and their
    concatenation once more by what reads it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        boundaries: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        counts = [b - a for a, b in pairwise(boundaries)]
        ctx.compiled, ctx.boundaries, ctx.scale = False, boundaries, scale
        if compiled.serves(query, key, value):
            ctx.compiled = True
            mixed, sums = compiled.attend(query, key, value, boundaries, scale)
            ctx.save_for_backward(query, key, value, mixed, sums)
            return mixed
        parts = [
            _FORWARD(*part, 0.0, True, scale=scale)
            for part in zip(*(each.split(counts, 2) for each in (query, key, value)), strict=True)
        ]
        mixed = _join_rows([out for out, _ in parts])
        ctx.save_for_backward(query, key, value, mixed, *(sums for _, sums in parts))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mixed, *sums = ctx.saved_tensors
        rows = (grad, query, key, value, mixed)
        if ctx.compiled:
            return *compiled.attend_back(*rows, sums[0], ctx.boundaries, ctx.scale), None, None
        counts = [b - a for a, b in pairwise(ctx.boundaries)]
        parts = [
            _BACKWARD(*part, 0.0, True, scale=ctx.scale)
            for part in zip(*(each.split(counts, 2) for each in rows), sums, strict=True)
        ]
        return (*(_join_rows(list(each)) for each in zip(*parts, strict=True)), None, None)


def _join_rows(parts: list[Tensor]) -> Tensor:
    """Documents `[1, heads, tokens, d]` in one row, which lies in memory token by token."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(1, 2) for part in parts], 1).transpose(1, 2)


def _causal(
    query: Float[Tensor, "rows heads new head_dim"],
    key: Float[Tensor, "rows kv_heads all head_dim"],
    value: Float[Tensor, "rows kv_heads all value_dim"],
    rule: _Rule,
) -> Float[Tensor, "rows heads new value_dim"]:
    """The last `new` tokens of a document over `all` of it."""
    new, known = query.shape[2], key.shape[2]
    window = rule.window if rule.window is not None and rule.window < known else None
    if not rule.explicit and window is None and new in (1, known):
        return _fused(query, key, value, rule.scale, None)
    parts, first = [], known - new
    for block in torch.split(query, BLOCK_QUERIES if rule.explicit or window else new, 2):
        stop = first + block.shape[2]
        start = 0 if window is None else max(0, first - window + 1)
        visible = _visible(first, stop, start, window, query.device)
        seen = key[:, :, start:stop], value[:, :, start:stop]
        if rule.explicit:
            parts.append(_explicit(block, *seen, rule, visible))
        else:
            parts.append(_fused(block, *seen, rule.scale, visible))
        first = stop
    return _join(parts)


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _visible(
    first: int, stop: int, start: int, window: int | None, device: torch.device
) -> Bool[Tensor, "queries keys"]:
    """Which of the keys `start..stop` the queries `first..stop` see."""
    queries = torch.arange(first, stop, device=device)[:, None]
    keys = torch.arange(start, stop, device=device)[None]
    seen = keys <= queries
    return seen if window is None else seen & (keys > queries - window)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None
) -> Float[Tensor, "rows heads new value_dim"]:
    """torch's kernel; causal where `visible` is None and there is more than one query."""
    groups = query.shape[1] // key.shape[1]
    # Other kernels than these fall back to the slow path when asked to share heads.
    shares = query.device.type == "cpu" or (
        query.is_cuda and visible is None and query.dtype in (torch.bfloat16, torch.float16)
    )
    if groups > 1 and not shares:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=visible,
        is_causal=visible is None and query.shape[2] > 1,
        scale=scale,
        enable_gqa=groups > 1 and shares,
    )


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, rule: _Rule, visible: Tensor | None
) -> Float[Tensor, "rows heads new value_dim"]:
    """Written out in at least float32; softcap * tanh(scores / softcap) is Gemma 2, section 2."""
    rows, heads, new, _ = query.shape
    shared, known = key.shape[1:3]
    wide = torch.promote_types(query.dtype, torch.float32)
    # Heads that share keys stand beside each other as further queries, so no key is repeated.
    stacked = query.to(wide).reshape(rows, shared, -1, query.shape[-1])
    with torch.autocast(query.device.type, enabled=False):
        scores = stacked @ key.to(wide).transpose(-1, -2) * rule.scale
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        scores = scores.view(rows, heads, new, known)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        weights = scores.softmax(-1).view(rows, shared, -1, known)
        mixed = weights @ value.to(wide)
    return mixed.view(rows, heads, new, -1).to(query.dtype)


def _attend_remembered(
    query: Tensor, key: Tensor, value: Tensor, rule: _Rule, route: Route, layer: int
) -> Float[Tensor, "1 heads tokens value_dim"]:
    """Each document over what its row remembers, itself included."""
    cache = route.cache
    assert cache is not None
    cache.write(layer, key, value)
    now = cache.reading
    if now.fresh and not now.abreast:
        return _attend_documents(query, key, value, rule, route)
    heads = query[0].transpose(0, 1)
    parts = [_attend_abreast(heads, group, layer, rule) for group in now.abreast]
    for one in now.longer:
        keys, values = one.shelf.layers[layer]
        seen = keys[one.slot, None, :, : one.stop], values[one.slot, None, :, : one.stop]
        part = _causal(query[:, :, one.first : one.first + one.count], *seen, rule)
        parts.append(part[0].transpose(0, 1))
    mixed = parts[0] if len(parts) == 1 else torch.cat(parts)[now.order(query.device)]
    return mixed.transpose(0, 1)[None]


def _attend_abreast(
    heads: Float[Tensor, "tokens heads head_dim"], group: Abreast, layer: int, rule: _Rule
) -> Float[Tensor, "documents heads value_dim"]:
    """Documents of one token over their rows, all at once: shorter rows are masked to the longest."""
    keys, values = (part[: group.tall, :, : group.longest] for part in group.shelf.layers[layer])
    _, slots, _, by_slot = group.indices(heads.device)
    visible = group.visible(rule.window, heads.device)
    one = heads[by_slot]
    if rule.explicit:
        mixed = _explicit(one[:, :, None], keys, values, rule, visible)
    else:
        # Heads that share keys are further queries of the same row.
        stacked = one.view(group.tall, keys.shape[1], -1, one.shape[-1])
        mixed = F.scaled_dot_product_attention(
            stacked, keys, values, attn_mask=visible, scale=rule.scale
        )
    return mixed.reshape(group.tall, heads.shape[1], -1)[slots]


# The two below depend on their arguments alone and are asked for by every layer of a pass.
# Outside inference mode, because a tensor made inside it cannot be kept for a later backward.
@lru_cache(maxsize=2)
@torch.inference_mode(False)
def _block_diagonal(
    boundaries: tuple[int, ...], window: int | None, device: torch.device
) -> Bool[Tensor, "tokens tokens"]:
    """True where a token sees another: same document, not later, inside the window."""
    tokens = boundaries[-1]
    ends = torch.tensor(boundaries[1:], device=device)
    document = torch.bucketize(torch.arange(tokens, device=device), ends, right=True)
    return (document[:, None] == document[None]) & _visible(0, tokens, 0, window, device)


@lru_cache(maxsize=2)
@torch.inference_mode(False)
def _offsets(boundaries: tuple[int, ...], device: torch.device) -> Int[Tensor, " bounds"]:
    return torch.tensor(boundaries, dtype=torch.int32, device=device)


@lru_cache(maxsize=1)
def _varlen() -> Any:
    """torch's kernel for documents of unequal length, or None where this torch has none with
    windows and shared heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= known.keys() else None


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, rule: _Rule, boundaries: tuple[int, ...]
) -> Float[Tensor, "1 heads tokens value_dim"]:
    longest = max(b - a for a, b in pairwise(boundaries))
    offsets = _offsets(boundaries, query.device)
    # The kernel counts the keys before a token; ours counts the token itself too.
    left = -1 if rule.window is None or rule.window >= longest else rule.window - 1
    mixed: Tensor = _varlen()(
        *(part[0].transpose(0, 1) for part in (query, key, value)),
        offsets,
        offsets,
        longest,
        longest,
        scale=rule.scale,
        window_size=(left, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return mixed.transpose(0, 1)[None]
