"""The uniform form of an adapter says what the adapter says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pennyweight.config import LoraConfig
from pennyweight.lora import Adapter, uniform

MODULES = ("layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj")


def made(**settings: object) -> Adapter:
    """Two modules by the plain rule, one that patterns may mean."""
    config = LoraConfig.model_validate({"r": 4, "target_modules": ("q_proj", "v_proj"), **settings})
    generator = torch.Generator().manual_seed(3)
    ranks = dict.fromkeys(MODULES, 4) | {
        module: config.rank_pattern.get("v_proj", 4) for module in MODULES if "v_proj" in module
    }
    pairs = {
        module: (
            torch.randn(rank, 16, generator=generator),
            torch.randn(12, rank, generator=generator),
        )
        for module, rank in ranks.items()
    }
    return Adapter(config, pairs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 7}},
        {"alpha_pattern": {"v_proj": 3.0}},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5.0}, "use_rslora": True},
    ],
)
def test_it_says_the_same_with_one_rank_and_one_scaling(
    settings: dict[str, object], tmp_path: Path
) -> None:
    adapter = made(**settings)
    plain = Adapter.load(uniform(adapter).save(tmp_path))
    config = plain.config
    assert not any((config.use_rslora, config.rank_pattern, config.alpha_pattern))
    assert {a.shape[0] for a, _ in plain.factors.values()} == {config.r}
    for module in MODULES:
        assert plain.scaling(module) == config.lora_alpha / config.r
        torch.testing.assert_close(plain.delta(module), adapter.delta(module), rtol=2e-6, atol=1e-6)
    first = MODULES[0]
    if "rank_pattern" not in settings or settings["rank_pattern"] == {"v_proj": 2}:
        # What has the common rank and scaling keeps its numbers.
        assert torch.equal(plain.factors[first][1], adapter.factors[first][1])
