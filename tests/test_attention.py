"""Attention against a plain loop, on every backend, and the memory of keys and values against it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from pennyweight.attention import KVCache, attend
from pennyweight.errors import ModelError
from pennyweight.route import Route
from pennyweight.train import saved_bytes

HEADS, HEAD_DIM = 4, 8


class Layer(nn.Module):
    """What `attend` reads of a model's attention module."""

    def __init__(self, route: Route | None = None, layer_idx: int = 0) -> None:
        super().__init__()
        self.pennyweight_route = route or Route()
        self.layer_idx = layer_idx


def row(tokens: int, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values as models pass them: `[1, heads, tokens, head_dim]` views."""
    return [
        torch.randn(1, tokens, heads, HEAD_DIM, dtype=dtype).transpose(1, 2)
        for heads in (HEADS, kv_heads, kv_heads)
    ]


def plainly(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None
) -> Tensor:
    """One document, one query and one head at a time, from the definition."""
    rows = []
    for at in range(query.shape[2]):
        first = 0 if window is None else max(0, at - window + 1)
        heads = []
        for head in range(query.shape[1]):
            shared = head * key.shape[1] // query.shape[1]
            scores = key[0, shared, first : at + 1] @ query[0, head, at] * HEAD_DIM**-0.5
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            heads.append(scores.softmax(0) @ value[0, shared, first : at + 1])
        rows.append(torch.stack(heads))
    return torch.stack(rows)[None]


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_every_backend_follows_the_definition(
    kv_heads: int, window: int | None, softcap: float | None
) -> None:
    boundaries = (0, 3, 4, 11, 18)
    layer = Layer()
    tensors = [part.requires_grad_() for part in row(18, kv_heads)]
    expected = torch.cat(
        [
            plainly(*(part[:, :, a:b] for part in tensors), window, softcap)
            for a, b in pairwise(boundaries)
        ],
        dim=1,
    )
    readout = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * readout).sum(), tensors)
    for backend in ("auto", "documents", "masked", "eager"):
        layer.pennyweight_route.backend = backend
        with layer.pennyweight_route.over(boundaries, [None] * 4):
            found, weights = attend(layer, *tensors, None, sliding_window=window, softcap=softcap)
        assert weights is None
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        for mine, theirs in zip(
            torch.autograd.grad((found * readout).sum(), tensors), gradients, strict=True
        ):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("window", "softcap"), [(40, None), (300, None), (None, 0.7), (40, 0.7)])
def test_long_documents_are_the_same_in_blocks_of_queries(
    window: int | None, softcap: float | None
) -> None:
    from pennyweight.attention.causal import BLOCK_QUERIES

    tokens = 2 * BLOCK_QUERIES + 30
    layer = Layer()
    query, key, value = row(tokens)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * HEAD_DIM**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    for backend in ("documents", "eager"):
        layer.pennyweight_route.backend = backend
        with layer.pennyweight_route.over((0, tokens), (None,)):
            found, _ = attend(
                layer, query, key, value, None, sliding_window=window, softcap=softcap
            )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_eager_is_computed_in_float32_at_least() -> None:
    layer = Layer()
    layer.pennyweight_route.backend = "eager"
    tensors = [part.bfloat16() for part in row(9)]
    with layer.pennyweight_route.over((0, 9), (None,)):
        found, _ = attend(layer, *tensors, None)
        expected, _ = attend(layer, *(part.float() for part in tensors), None)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize("backend", ["documents", "eager"])
def test_under_autocast_all_three_go_in_its_type(backend: str) -> None:
    layer = Layer()
    layer.pennyweight_route.backend = backend
    query, key, value = (part.float() for part in row(9))
    with layer.pennyweight_route.over((0, 4, 9), (None, None)):
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = attend(layer, query, key, value.bfloat16(), None)
        expected, _ = attend(layer, query, key, value, None)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_the_models_own_scale_is_used() -> None:
    layer = Layer()
    query, key, value = row(5)
    with layer.pennyweight_route.over((0, 5), (None,)):
        scaled, _ = attend(layer, query, key, value, None, scaling=0.5)
        expected, _ = attend(layer, query * 0.5 * HEAD_DIM**0.5, key, value, None)
    torch.testing.assert_close(scaled, expected)


def test_a_mask_made_while_generating_serves_training_too() -> None:
    layer = Layer()
    layer.pennyweight_route.backend = "masked"
    tensors = row(7)
    with layer.pennyweight_route.over((0, 2, 7), (None, None)):
        with torch.inference_mode():
            attend(layer, *tensors, None)
        leaves = [part.clone().requires_grad_() for part in tensors]
        attend(layer, *leaves, None)[0].sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize(
    ("passed", "words"),
    [
        ({"is_causal": False}, "both directions"),
        ({"s_aux": torch.zeros(4)}, "passes 's_aux'"),
        ({"dropout": 0.1}, "eval mode"),
    ],
)
def test_what_is_not_plain_causal_attention_is_refused(
    passed: dict[str, object], words: str
) -> None:
    layer = Layer()
    with (
        layer.pennyweight_route.over((0, 3), (None,)),
        pytest.raises(ModelError, match=words),
    ):
        attend(layer, *row(3), None, **passed)


def test_varlen_is_refused_where_it_cannot_run() -> None:
    layer = Layer()
    layer.pennyweight_route.backend = "varlen"
    with (
        layer.pennyweight_route.over((0, 3), (None,)),
        pytest.raises(
            ModelError, match=r"found torch.float64 on cpu: set base.attention to `auto`"
        ),
    ):
        attend(layer, *row(3), None)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 16])
def test_varlen_is_documents(window: int | None) -> None:
    layer = Layer()
    boundaries = (0, 30, 31, 130, 229)
    tensors = [part.cuda().detach().requires_grad_() for part in row(229, 2, torch.bfloat16)]
    outputs, gradients = [], []
    for backend in ("documents", "varlen"):
        layer.pennyweight_route.backend = backend
        with layer.pennyweight_route.over(boundaries, [None] * 4):
            out, _ = attend(layer, *tensors, None, sliding_window=window)
        outputs.append(out)
        gradients.append(torch.autograd.grad(out.float().square().sum(), tensors))
    torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("backend", ["documents", "masked", "eager"])
def test_remembered_is_read_at_once(
    backend: str, window: int | None, softcap: float | None
) -> None:
    """Rows begin together or later, go on by one token or several, in any order, and leave; each
    token sees what it would have seen had its whole text been read in one pass."""
    route = Route()
    route.backend = backend
    layers = [Layer(route, index) for index in range(2)]
    texts = {name: [row(90) for _ in layers] for name in "abc"}
    expected = {
        name: [plainly(*whole, window, softcap) for whole in text] for name, text in texts.items()
    }
    read = dict.fromkeys(texts, 0)
    cache = KVCache(3)

    @torch.inference_mode()
    def go_on(**counts: int) -> None:
        places = [rows.index(name) for name in counts]
        assert cache.extend(places, list(counts.values())) == tuple(read[name] for name in counts)
        boundaries = [0]
        for count in counts.values():
            boundaries.append(boundaries[-1] + count)
        for index, layer in enumerate(layers):
            parts = [
                torch.cat(
                    [texts[n][index][i][:, :, read[n] : read[n] + c] for n, c in counts.items()], 2
                )
                for i in range(3)
            ]
            with route.over(boundaries, [None] * len(counts), cache=cache):
                found, _ = attend(layer, *parts, None, sliding_window=window, softcap=softcap)
            wanted = [expected[n][index][:, read[n] : read[n] + c] for n, c in counts.items()]
            torch.testing.assert_close(found, torch.cat(wanted, 1), rtol=1e-10, atol=1e-12)
        for name, count in counts.items():
            read[name] += count

    rows = ["a", "b"]
    go_on(b=3, a=9)
    go_on(a=1, b=1)
    go_on(b=1, a=1)
    rows = ["a", "b", "c"]
    go_on(c=1)
    go_on(b=1, c=1, a=1)
    go_on(c=4, a=2)
    go_on(b=1)
    cache.drop(0)
    rows, read["a"] = ["c", "b"], 0
    go_on(b=1, c=1)
    rows = ["c", "b", "a"]
    go_on(a=70)
    go_on(a=1, b=1, c=1)
    assert cache.lengths == [read[name] for name in rows]
    # A fork goes on from where its row stood.
    cache.drop(2)
    texts["d"] = [[p[:, :, :3] for p in parts] for parts in texts["c"]]
    texts["d"] = [
        [torch.cat([a, b], 2) for a, b in zip(kept, row(9), strict=True)] for kept in texts["d"]
    ]
    expected["d"] = [plainly(*whole, window, softcap) for whole in texts["d"]]
    assert cache.fork(0, 3) == 2
    rows, read["d"] = ["c", "b", "d"], 3
    go_on(d=5, c=1)
    go_on(c=1, b=1, d=1)


def test_documents_outputs_are_kept_once() -> None:
    """q, k, v, one output for all documents, and a log-sum-exp a head and token."""
    tokens = 40
    layer = Layer()
    query, key, value = (
        torch.randn(1, tokens, heads, HEAD_DIM).transpose(1, 2).requires_grad_(True)
        for heads in (HEADS, 2, 2)
    )
    weight = torch.randn(HEADS * HEAD_DIM, 8, requires_grad=True)

    def read() -> Tensor:
        mixed, _ = attend(layer, query, key, value, None)
        return mixed.reshape(1, tokens, -1) @ weight

    with layer.pennyweight_route.over((0, 13, 14, tokens), (None,) * 3):
        kept = saved_bytes(read, besides=[weight])
    assert kept == 4 * tokens * (HEAD_DIM * (2 * HEADS + 2 * 2) + HEADS)
