"""Singular values from the core are those of the product; effective rank counts directions in use."""

from __future__ import annotations

import pytest
import torch

from pennyweight.compare.spectrum import effective_rank, singular_values, spectra
from pennyweight.config import LoraConfig
from pennyweight.lora import Adapter


@pytest.mark.parametrize(("r", "d_in", "d_out"), [(4, 30, 20), (4, 4, 9), (16, 6, 40), (1, 5, 5)])
def test_the_core_has_the_singular_values_of_the_product(r: int, d_in: int, d_out: int) -> None:
    a, b = torch.randn(r, d_in), torch.randn(d_out, r)
    whole = torch.linalg.svdvals(b.double() @ a.double())[: min(r, d_in, d_out)]
    assert torch.allclose(singular_values(a, b), whole, rtol=1e-9)


def test_effective_rank_of_known_spectra() -> None:
    assert effective_rank([3.0, 3.0, 3.0, 3.0]) == pytest.approx(4)
    assert effective_rank([5.0, 0.0, 0.0]) == 1
    assert effective_rank([0.0, 0.0]) == 0
    assert 1 < effective_rank([9.0, 1.0]) < 2


def test_an_adapter_that_uses_one_direction_of_eight_is_seen_to() -> None:
    a, b = torch.zeros(8, 12), torch.zeros(10, 8)
    a[0], b[:, 0] = torch.randn(12), torch.randn(10)
    config = LoraConfig(r=8, lora_alpha=16)
    (values,) = spectra(Adapter(config, {"layers.0.q_proj": (a, b)})).values()
    assert len(values) == 8
    assert effective_rank(values) == pytest.approx(1)
    assert values[0] == pytest.approx(2 * float(torch.outer(b[:, 0], a[0]).norm()), rel=1e-6)
