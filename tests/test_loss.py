"""The loss against a float64 reference with full logits, in every chunking, and what it keeps."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pennyweight.loss import chunk_rows, summed_cross_entropy, targets
from pennyweight.model import Head
from pennyweight.train.memory import saved_bytes

D, VOCAB = 16, 41
BOUNDARIES = (0, 7, 8, 20, 33)
TOKENS = BOUNDARIES[-1]


class Around(nn.Module):
    """Stands around a plain head as an adapter does."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.base_layer = inner
        self.delta = nn.Parameter(torch.randn(VOCAB, D) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.delta.T


def head(
    *,
    bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    trainable: bool = False,
    around: bool = False,
) -> Head:
    plain = nn.Linear(D, VOCAB, bias=bias).requires_grad_(trainable)
    module = Around(plain) if around else plain
    return Head(plain.weight, plain.bias, softcap, scale, trainable, around, module)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(TOKENS, D, requires_grad=True)
    return hidden, torch.randint(VOCAB, (TOKENS,)), torch.rand(TOKENS) < 0.6


def reference(hidden: Tensor, ids: Tensor, trained: Tensor, head: Head) -> Tensor:
    """Full logits, float64, document by document."""
    total = hidden.new_zeros((), dtype=torch.float64)
    weight = head.weight.double()
    if isinstance(head.module, Around):
        weight = weight + head.module.delta.double()
    for start, stop in pairwise(BOUNDARIES):
        logits = hidden[start:stop].double() @ weight.T
        if head.bias is not None:
            logits = logits + head.bias.double()
        logits = logits * head.scale
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        for i in range(start, stop - 1):
            if trained[i + 1]:
                total = total - logits[i - start].log_softmax(0)[ids[i + 1]]
    return total


def test_targets_stay_in_their_document() -> None:
    ids = torch.tensor([5, 6, 7, 8, 9])
    rows, wanted = targets(ids, torch.ones(5, dtype=torch.bool), (0, 3, 5))
    assert rows.tolist() == [0, 1, 3]
    assert wanted.tolist() == [6, 7, 9]


def test_targets_are_what_is_trained_and_not_what_stands_before() -> None:
    trained = torch.tensor([True, False, True, True, False])
    rows, wanted = targets(torch.tensor([5, 6, 7, 8, 9]), trained, (0, 3, 5))
    assert (rows.tolist(), wanted.tolist()) == ([1], [7])


@pytest.mark.parametrize("tokens", [0, 1])
def test_targets_of_next_to_nothing(tokens: int) -> None:
    ids = torch.zeros(tokens, dtype=torch.int64)
    rows, wanted = targets(ids, torch.ones(tokens, dtype=torch.bool), (0, tokens))
    assert rows.numel() == wanted.numel() == 0


@pytest.mark.parametrize("chunk", [1, 3, 16, 1000, None])
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"bias": True, "scale": 0.25},
        {"softcap": 3.0},
        {"softcap": 3.0, "scale": 2.0, "bias": True, "trainable": True},
        {"trainable": True},
        {"around": True, "softcap": 3.0, "bias": True},
    ],
    ids=str,
)
def test_sum_and_gradients_equal_the_reference(kind: dict[str, Any], chunk: int | None) -> None:
    hidden, ids, trained = inputs()
    h = head(**kind)
    learned = [p for p in h.module.parameters() if p.requires_grad]
    expected = reference(hidden, ids, trained, h)
    wanted = torch.autograd.grad(expected * 0.5, [hidden, *learned])
    total, count = summed_cross_entropy(hidden, ids, trained, BOUNDARIES, h, chunk_tokens=chunk)
    found = torch.autograd.grad(total * 0.5, [hidden, *learned])
    assert count == sum(int(trained[a + 1 : b].sum()) for a, b in pairwise(BOUNDARIES))
    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=0)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)


def test_half_precision_products_stay_near_the_reference() -> None:
    hidden, ids, trained = inputs()
    expected = reference(hidden, ids, trained, h := head(trainable=True))
    wanted = torch.autograd.grad(expected, [hidden, h.weight])
    half = hidden.detach().bfloat16().requires_grad_()
    total, _ = summed_cross_entropy(half, ids, trained, BOUNDARIES, h, chunk_tokens=5)
    found = torch.autograd.grad(total, [half, h.weight])
    assert total.dtype == torch.float64
    assert [g.dtype for g in found] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(total.double(), expected, rtol=5e-3, atol=0)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0, atol=0.03)


@pytest.mark.parametrize("around", [False, True])
def test_nothing_trained_is_zero_with_zero_gradients(around: bool) -> None:
    hidden, ids, _ = inputs()
    none = torch.zeros(TOKENS, dtype=torch.bool)
    total, count = summed_cross_entropy(hidden, ids, none, BOUNDARIES, head(around=around))
    (gradient,) = torch.autograd.grad(total, hidden)
    assert (total.item(), count) == (0.0, 0)
    assert not gradient.any()


@pytest.mark.parametrize("around", [False, True])
def test_without_gradients_the_same_sum_and_no_gradient_work(around: bool) -> None:
    hidden, ids, trained = inputs()
    h = head(around=around)
    with_gradient, _ = summed_cross_entropy(hidden, ids, trained, BOUNDARIES, h)
    with torch.no_grad():
        total, _ = summed_cross_entropy(hidden, ids, trained, BOUNDARIES, h)
    assert not total.requires_grad
    assert total.item() == with_gradient.item()


def test_a_masked_out_word_costs_nothing_and_a_nan_shows() -> None:
    hidden, ids, trained = inputs()
    h = head(bias=True)
    with torch.no_grad():
        h.bias[VOCAB - 1] = -math.inf
    ids = ids.clamp(max=VOCAB - 2)
    total, _ = summed_cross_entropy(hidden, ids, trained, BOUNDARIES, h)
    (gradient,) = torch.autograd.grad(total, hidden)
    assert math.isfinite(total.item())
    assert gradient.isfinite().all()
    broken = hidden.detach().clone()
    broken[targets(ids, trained, BOUNDARIES)[0][0]] = math.nan
    assert summed_cross_entropy(broken, ids, trained, BOUNDARIES, h)[0].isnan()


@pytest.mark.parametrize("around", [False, True])
def test_full_logits_are_never_kept(around: bool) -> None:
    tokens, vocab = 64, 4096
    hidden = torch.randn(tokens, D, requires_grad=True)
    plain = nn.Linear(D, vocab, bias=False).requires_grad_(False)
    module = nn.Sequential(plain) if around else plain
    h = Head(plain.weight, None, None, 1.0, False, around, module)
    ids, trained = torch.randint(vocab, (tokens,)), torch.ones(tokens, dtype=torch.bool)
    kept = saved_bytes(
        lambda: summed_cross_entropy(hidden, ids, trained, (0, tokens), h, chunk_tokens=8),
        besides=[plain.weight, hidden],
    )
    assert kept <= 2 * hidden.nbytes + 2 * ids.nbytes + 64


def test_chunks_are_chosen_by_bytes() -> None:
    assert chunk_rows(32_000, torch.device("cpu")) == 524
    assert chunk_rows(10**9, torch.device("cpu")) == 16
    assert chunk_rows(32_000, torch.device("cuda")) > 4000


@pytest.mark.parametrize("vocab", [50, 96])
def test_in_bf16_the_sum_and_its_gradient_are_as_near_to_float64s_as_roundings(vocab: int) -> None:
    """In chunks, with and without the kernel for it; a logit that is no number shows in the sum."""
    layer = nn.Linear(64, vocab, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    plain = {"bias": None, "softcap": None, "scale": 1.0, "trainable": False, "wrapped": False}
    head = Head(weight=layer.weight, module=layer, **plain)
    hidden = torch.randn(300, 64).bfloat16().requires_grad_()
    ids, trained = torch.randint(0, vocab, (300,)), torch.ones(300, dtype=torch.bool)
    wide = hidden.detach().double().requires_grad_()
    logits = (wide @ head.weight.double().T)[:-1]
    exact = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    (slope,) = torch.autograd.grad(exact, wide)
    total, count = summed_cross_entropy(hidden, ids, trained, (0, 300), head, chunk_tokens=128)
    (found,) = torch.autograd.grad(total, hidden)
    assert count == 299
    assert total.item() == pytest.approx(exact.item(), rel=1e-3)
    assert (found.double() - slope).norm() <= 0.01 * slope.norm()
    with torch.no_grad():
        again, _ = summed_cross_entropy(hidden, ids, trained, (0, 300), head)
        assert again.item() == total.item()
        spoiled, _ = summed_cross_entropy(hidden * torch.nan, ids, trained, (0, 300), head)
    assert spoiled.isnan()
