"""Models large enough for the arithmetic to show, and the shapes that describe them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pennyweight.config import BaseConfig, DataConfig, LoraConfig, RunConfig, TrainConfig
from pennyweight.plan.devices import GIB, Device
from pennyweight.shapes import Shapes, dense_shapes

CPU = Device("cpu", "cpu", 16 * GIB, 20e9, 100e9)


class Sized(NamedTuple):
    """A saved random model and its shapes."""

    folder: Path
    shapes: Shapes


@pytest.fixture(scope="session")
def sized_model(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any
) -> Callable[..., Sized]:
    """`sized_model(family, layers=..., hidden=..., ...)`, built once in a session."""
    built: dict[str, Sized] = {}

    def make(family: str = "llama", **numbers: int) -> Sized:
        from transformers import AutoConfig, AutoModelForCausalLM

        key = f"{family} {sorted(numbers.items())}"
        if key in built:
            return built[key]
        shapes = dense_shapes(
            family, **numbers, qk_norm=family == "qwen3", qkv_bias=family == "qwen2"
        )
        config = AutoConfig.for_model(
            family,
            hidden_size=shapes.hidden,
            intermediate_size=shapes.intermediate,
            num_hidden_layers=shapes.layers,
            num_attention_heads=shapes.heads,
            num_key_value_heads=shapes.kv_heads,
            head_dim=shapes.head_dim,
            vocab_size=shapes.vocab,
            max_position_embeddings=shapes.max_positions,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=None,
        )
        folder = tmp_path_factory.mktemp("sized")
        # In 16 bits as models are published. From a file in the type that the run computes in,
        # unquantized weights are views of the mapped file, which then stays resident.
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        built[key] = Sized(folder, shapes)
        return built[key]

    return make


def run_config(
    folder: Path | str = "x",
    *,
    tokens: int = 256,
    documents: int = 1,
    method: str = "qlora",
    dtype: str = "float32",
    recompute: bool = False,
    **adapter: Any,
) -> RunConfig:
    """A run whose micro-batch is `documents` rows that make `tokens` together."""
    return RunConfig(
        base=BaseConfig(
            model=str(folder),
            dtype=dtype,
            device="cpu",
            quantization="nf4" if method == "qlora" else "none",
        ),
        adapter=LoraConfig(**{"r": 8, **adapter}),
        data=DataConfig(max_length=tokens // documents),
        train=TrainConfig(method=method, batch_size=documents, gradient_checkpointing=recompute),
    )
