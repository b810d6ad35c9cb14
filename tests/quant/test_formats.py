from __future__ import annotations

from types import ModuleType

import torch

from pennyweight.quant import DYNAMIC_8BIT, FP4_LEVELS, NF4_LEVELS
from pennyweight.quant.formats import pair_table, thresholds


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_levels_are_those_of_bitsandbytes_bit_for_bit(bnb: ModuleType) -> None:
    assert same_bits(NF4_LEVELS, bnb.get_4bit_type("nf4", device="cpu"))
    assert same_bits(FP4_LEVELS, bnb.get_4bit_type("fp4", device="cpu"))


def test_dynamic_levels_are_those_of_bitsandbytes_bit_for_bit(bnb: ModuleType) -> None:
    assert same_bits(DYNAMIC_8BIT, bnb.create_dynamic_map())


def test_nf4_is_normal_quantiles_around_an_exact_zero() -> None:
    """QLoRA, section 3 and appendix E: quantiles of equal share up to 0.9677, 8 up and 7 down."""
    normal = torch.distributions.Normal(0.0, 1.0)
    up = normal.icdf(torch.linspace(0.9677083, 0.5, 9))[:-1]
    down = -normal.icdf(torch.linspace(0.9677083, 0.5, 8))[:-1]
    levels = torch.cat([up, torch.zeros(1), down]).sort().values
    torch.testing.assert_close(NF4_LEVELS, levels / levels.max(), atol=1e-6, rtol=0)


def test_levels_reach_both_ends_and_hold_zero() -> None:
    for levels in (NF4_LEVELS, FP4_LEVELS):
        assert levels.min() == -1
        assert levels.max() == 1
        assert 0 in levels
    assert torch.equal(DYNAMIC_8BIT, DYNAMIC_8BIT.unique())
    assert DYNAMIC_8BIT.abs().max() == 1


def test_a_byte_holds_the_first_level_in_its_high_half() -> None:
    pairs = pair_table("nf4", torch.device("cpu")).view(torch.float32).view(256, 2)
    assert pairs[0x2F].tolist() == [NF4_LEVELS[2].item(), NF4_LEVELS[15].item()]


def test_thresholds_lie_between_neighbours() -> None:
    for kind, levels in (("nf4", NF4_LEVELS), ("fp4", FP4_LEVELS)):
        ascending = levels.sort().values.tolist()
        for low, threshold, high in zip(ascending, thresholds(kind), ascending[1:], strict=False):
            assert low <= threshold <= high
