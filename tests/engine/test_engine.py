"""The four verbs: training moved to host memory and back, saved and taken up, answered meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pennyweight.budget import MemoryBudget
from pennyweight.config import BaseConfig, LoraConfig, TrainConfig
from pennyweight.data.batch import Batch, collate
from pennyweight.data.conversation import Example
from pennyweight.engine import Engine
from pennyweight.errors import AdapterError, ConfigError, MemoryExhausted
from pennyweight.generate import Request
from pennyweight.lora import attached
from pennyweight.model import BaseModel, load_base

TRAIN = TrainConfig(learning_rate=1e-2, max_grad_norm=0.5)


@pytest.fixture(scope="module")
def base(tiny_model_folder: Callable[[str], Path]) -> BaseModel:
    folder = str(tiny_model_folder("llama"))
    return load_base(BaseConfig(model=folder, quantization="nf4", device="cpu"))


def batch(number: int) -> Batch:
    draw = np.random.default_rng(number)
    return collate(
        [Example(draw.integers(5, 288, 12).astype(np.int32), np.ones(12, bool), "r:1", 12)]
    )


def go(engine: Engine, name: str, steps: range) -> None:
    for number in steps:
        engine.forward_backward({name: batch(number)})
        engine.optim_step(name)


def bits(engine: Engine, name: str) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in engine._state(engine._entry(name))[0].items()}


def test_rest_save_and_answers_on_the_way_change_no_bit(base: BaseModel, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_dropout=0.2)
    engine = Engine(base)
    engine.begin("whole", config, TRAIN, total_steps=6, seed=3)
    go(engine, "whole", range(6))
    expected = bits(engine, "whole")
    engine.begin("moved", config, TRAIN, total_steps=6, seed=3)
    go(engine, "moved", range(2))
    engine.rest("moved")
    assert attached(base) == ["whole"]
    ask = Request(tuple(range(5, 15)), max_new_tokens=4, stop_ids=(), adapter="moved")
    (answer,) = engine.sample([ask])
    go(engine, "moved", range(2, 4))
    engine.save_state("moved", tmp_path)
    version = engine.keep("moved")
    engine.end("moved")
    assert engine.bank.names() == {"moved": version}
    kept = engine.sample([ask])[0].ids
    engine.bank.unload(version)
    engine.begin("moved", config, TRAIN, total_steps=6, seed=3)
    assert engine.load_state("moved", tmp_path) == 4
    assert engine.sample([ask])[0].ids == kept
    go(engine, "moved", range(4, 6))
    assert bits(engine, "moved") == expected
    assert len(answer.ids) == 4
    engine.begin("other", config, TRAIN, total_steps=6, seed=4)
    with pytest.raises(ConfigError, match="seed: the checkpoint was made with 3"):
        engine.load_state("other", tmp_path)
    for name in list(engine.learning()):
        engine.end(name)
    assert attached(base) == []


def test_memory_is_reserved_first_and_idle_training_makes_room(base: BaseModel) -> None:
    config = LoraConfig(r=4)
    engine = Engine(base)
    engine.begin("one", config, TRAIN, total_steps=2)
    size = engine._entry("one").size_bytes
    assert size == 16 * sum(p.numel() for p in engine._learning("one").parameters.values())
    engine.end("one")
    engine = Engine(base, budget=MemoryBudget(size * 3 // 2))
    engine.begin("one", config, TRAIN, total_steps=2, seed=1)
    engine.begin("two", config, TRAIN, total_steps=2, seed=2)
    assert engine.learning() == {"one": False, "two": True}
    engine.forward_backward({"two": batch(0)})
    with pytest.raises(MemoryExhausted, match="training adapter one needs"):
        engine.wake("one")
    engine.optim_step("two")
    engine.wake("one")
    assert engine.learning() == {"one": True, "two": False}
    with pytest.raises(AdapterError, match="is here already"):
        engine.begin("one", config, TRAIN, total_steps=2)
    with pytest.raises(AdapterError, match="those that do: one, two"):
        engine.optim_step("three")
    for name in list(engine.learning()):
        engine.end(name)
    assert engine.budget is not None
    assert engine.budget.held() == {}
