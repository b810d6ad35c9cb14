"""Small adapters without a model: factors as a run would have left them, with its receipt beside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pennyweight.config import LoraConfig
from pennyweight.lora import Adapter
from pennyweight.registry import Registry

BASE = "b" * 64


def receipt(loss: float, **settings: Any) -> dict[str, Any]:
    """The parts of a run's receipt that a registry reads."""
    values = {"seed": 0, "train.learning_rate": 2e-4, **settings}
    arms = {
        "before": {"loss": 3.0, "loss_interval_95": [2.9, 3.1], "token_accuracy": 0.25},
        "after": {"loss": loss, "loss_interval_95": [loss - 0.1, loss + 0.1]},
    }
    return {
        "data": {"fingerprint": "d" * 64},
        "configuration": {key: {"value": value, "from": "file"} for key, value in values.items()},
        "held_out": {"rows": 20, **arms},
    }


@pytest.fixture
def adapter_at(tmp_path: Path) -> Callable[..., Path]:
    """`adapter_at("one", seed=3)`: a folder in PEFT's layout."""

    def write(name: str, *, seed: int = 0, loss: float | None = 1.5, **how: Any) -> Path:
        settings = {key: how.pop(key) for key in list(how) if "." in key}
        generator = torch.Generator().manual_seed(seed)
        config = LoraConfig.model_validate({"r": 2, "target_modules": ("q_proj",), **how})
        pair = (torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator))
        module = "model.layers.0.self_attn.q_proj"
        adapter = Adapter(config, {module: pair}, base_name="some/base", base_fingerprint=BASE)
        folder = adapter.save(tmp_path / name)
        if loss is not None:
            told = receipt(loss, **settings)
            (folder / "receipt.json").write_text(json.dumps(told), encoding="utf-8")
        return folder

    return write


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")
