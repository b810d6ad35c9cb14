"""A tiny resident base with a fresh adapter, rows, and a trainee over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.data.batch import Batch, collate
from pennyweight.data.conversation import Example
from pennyweight.lora import attach, trained_parameters
from pennyweight.model import BaseModel, load_base
from pennyweight.optim import adamw
from pennyweight.train import Trainee


@pytest.fixture
def base(tiny_llama_folder: Path) -> BaseModel:
    made = load_base(BaseConfig(model=str(tiny_llama_folder), quantization="none", device="cpu"))
    attach(made, LoraConfig(r=4), seed=1)
    return made


@pytest.fixture
def rows() -> list[Example]:
    """Ten rows of 5 to 23 tokens, `rows.jsonl:1` and on."""
    draw = np.random.default_rng(3)
    lengths = [5 + 2 * i for i in range(10)]
    return [
        Example(
            draw.integers(5, 288, length).astype(np.int32),
            np.arange(length) > 1,
            f"rows.jsonl:{number + 1}",
            length,
        )
        for number, length in enumerate(lengths)
    ]


@pytest.fixture
def batch_of(rows: list[Example]) -> Callable[..., Batch]:
    """`batch_of(0, 3)`: rows 1 and 4 of the file as one batch."""
    return lambda *places: collate([rows[place] for place in places])


@pytest.fixture
def trainee(base: BaseModel) -> Trainee:
    parameters = trained_parameters(base, "default")
    return Trainee(base, parameters, adamw(parameters), learning_rate_at=lambda step: 1e-2)
