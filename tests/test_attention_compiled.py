"""The compiled kernel in every variant that runs here against the definition in float64."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pennyweight.attention import compiled
from pennyweight.quant.kernels.build import variants
from pennyweight.quant.kernels.cpu import library
from pennyweight.quant.kernels.cpu.library import SWITCH, chosen, why_none


@pytest.fixture(params=[*variants()])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(SWITCH, request.param)
    library._chosen.cache_clear()
    if chosen() is None:
        pytest.skip(why_none())
    yield request.param
    library._chosen.cache_clear()


def rows(tokens: int, heads: int, width: int) -> Tensor:
    """As models pass them: `[1, heads, tokens, width]` views of rows token by token."""
    return torch.randn(1, tokens, heads, width).transpose(1, 2)


def defined(
    query: Tensor, key: Tensor, value: Tensor, bounds: tuple[int, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps, one document at a time."""
    groups, mixed, sums = query.shape[1] // key.shape[1], [], []
    for start, stop in pairwise(bounds):
        q, k, v = (each[:, :, start:stop] for each in (query, key, value))
        scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scale
        seen = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
        mixed.append(scores.softmax(-1) @ v.repeat_interleave(groups, 1))
        sums.append(scores.logsumexp(-1)[0])
    return torch.cat(mixed, 2), torch.cat(sums, 1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "bounds"),
    [
        (4, 4, 64, (0, 100)),
        (4, 2, 32, (0, 3, 4, 70, 199)),
        (8, 2, 128, (0, 64, 192, 321)),
        (2, 1, 16, (0, 1, 2, 66)),
        (2, 2, 240, (0, 65)),
    ],
)
def test_values_and_gradients_follow_the_definition(
    variant: str, heads: int, kv_heads: int, width: int, bounds: tuple[int, ...]
) -> None:
    tokens, scale = bounds[-1], 2 * width**-0.5
    query, grad = rows(tokens, heads, width), rows(tokens, heads, width)
    key, value = rows(tokens, kv_heads, width), rows(tokens, kv_heads, width).contiguous()
    assert compiled.serves(query, key, value)
    mixed, sums = compiled.attend(query, key, value, bounds, scale)
    slopes = compiled.attend_back(grad, query, key, value, mixed, sums, bounds, scale)
    exact = [each.double().requires_grad_() for each in (query, key, value)]
    wanted, logs = defined(exact[0], exact[1], exact[2], bounds, scale)
    torch.testing.assert_close(sums.double(), logs.detach(), rtol=0, atol=1e-5)
    pairs = zip(
        (mixed, *slopes), (wanted, *torch.autograd.grad(wanted, exact, grad.double())), strict=True
    )
    for one, two in pairs:
        exactly = two.detach()
        assert (one - exactly).abs().max() <= 3e-6 * max(1.0, float(exactly.abs().max()))


def test_in_bf16_the_distance_from_the_definition_is_one_of_rounding(variant: str) -> None:
    for heads, kv_heads, width, bounds in (
        (4, 2, 32, (0, 3, 4, 71, 199)),
        (2, 2, 240, (0, 65)),
        (2, 1, 16, (0, 1, 2, 67)),
    ):
        tokens, scale = bounds[-1], 2 * width**-0.5
        query, grad, key, value = (
            rows(tokens, n, width).bfloat16() for n in (heads, heads, kv_heads, kv_heads)
        )
        assert compiled.serves(query, key, value)
        mixed, sums = compiled.attend(query, key, value, bounds, scale)
        slopes = compiled.attend_back(grad, query, key, value, mixed, sums, bounds, scale)
        exact = [each.double().requires_grad_() for each in (query, key, value)]
        wanted, logs = defined(exact[0], exact[1], exact[2], bounds, scale)
        torch.testing.assert_close(sums.double(), logs.detach(), rtol=0, atol=1e-5)
        theirs = wanted, *torch.autograd.grad(wanted, exact, grad.double())
        for one, two in zip((mixed, *slopes), theirs, strict=True):
            assert one.dtype == torch.bfloat16
            assert (one.double() - two.detach()).norm() <= 2**-7 * two.detach().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_is_blind_to_its_neighbours(variant: str, dtype: torch.dtype) -> None:
    query, key, value = (rows(90, heads, 32).to(dtype) for heads in (4, 2, 2))
    whole, _ = compiled.attend(query, key, value, (0, 20, 90), 0.2)
    for part in (slice(0, 20), slice(20, 90)):
        q, k, v = (each[:, :, part] for each in (query, key, value))
        alone, _ = compiled.attend(q, k, v, (0, part.stop - part.start), 0.2)
        assert torch.equal(whole[:, :, part], alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_apart_stay_finite(variant: str, dtype: torch.dtype) -> None:
    query, key, value = ((100 * rows(70, 2, 16)).to(dtype) for _ in range(3))
    mixed, sums = compiled.attend(query, key, value, (0, 70), 1.0)
    wanted, logs = defined(query.double(), key.double(), value.double(), (0, 70), 1.0)
    torch.testing.assert_close(sums.double(), logs, rtol=1e-5, atol=1e-2)
    assert torch.isfinite(mixed).all()
    slopes = compiled.attend_back(
        torch.ones_like(mixed), query, key, value, mixed, sums, (0, 70), 1.0
    )
    assert all(torch.isfinite(slope).all() for slope in slopes)
    assert (mixed - wanted).abs().median() < (1e-3 if dtype == torch.float32 else 0.5)


def test_other_rows_are_torchs() -> None:
    plain = rows(4, 2, 16)
    assert not compiled.serves(plain.double(), plain.double(), plain.double())
    assert not compiled.serves(plain.half(), plain.half(), plain.half())
    assert not compiled.serves(plain[..., :8], plain[..., :8], plain[..., :8])
    assert not compiled.serves(plain.to("meta"), plain.to("meta"), plain.to("meta"))
