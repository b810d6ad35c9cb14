"""Law 7: X trained beside Y = X trained alone, bit for bit in `exact`, within a bound in `fast`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pennyweight.config import BaseConfig, LoraConfig, TrainConfig
from pennyweight.data.batch import Batch, collate
from pennyweight.data.conversation import Example
from pennyweight.engine import Engine
from pennyweight.errors import DivergedError, MemoryExhausted
from pennyweight.model import BaseModel, load_base

STEPS = 4
# `fast` against alone: of a pass's summed loss and gradients, relative to their own size; and of
# every weight after four steps of AdamW at 1e-2, whose steps are as long for a small gradient.
BOUND, WEIGHTS_BOUND = 1e-5, 1e-3

ADAPTERS = {
    "x": (
        LoraConfig(r=4, lora_dropout=0.3),
        TrainConfig(learning_rate=1e-2, gradient_accumulation_steps=2, max_grad_norm=0.5),
    ),
    "y": (
        LoraConfig(r=8, lora_alpha=8, lora_dropout=0.1, target_modules=("q_proj", "down_proj")),
        TrainConfig(learning_rate=3e-3, lr_scheduler_type="linear", weight_decay=0.1),
    ),
    "head": (
        LoraConfig(r=2, target_modules=("v_proj", "lm_head")),
        TrainConfig(learning_rate=1e-2, max_grad_norm=None, warmup_steps=2),
    ),
    "copy": (
        LoraConfig(r=2, target_modules=("o_proj",), modules_to_save=("norm",)),
        TrainConfig(learning_rate=1e-3, gradient_accumulation_steps=3, adam_beta2=0.95),
    ),
}


@pytest.fixture(scope="module")
def base(tiny_model_folder: Callable[[str], Path]) -> BaseModel:
    folder = str(tiny_model_folder("llama"))
    return load_base(BaseConfig(model=folder, quantization="nf4", device="cpu"))


def micro_batch(name: str, step: int, place: int) -> Batch:
    """Rows of this adapter's own; no other name, step or place gives the same."""
    draw = np.random.default_rng([list(ADAPTERS).index(name), step, place])
    rows = [
        Example(draw.integers(5, 288, n).astype(np.int32), np.arange(n) > 2, f"{name}.jsonl:{i}", n)
        for i, n in enumerate(draw.integers(4, 20, 3).tolist())
    ]
    return collate(rows)


def begun(base: BaseModel, names: tuple[str, ...], mode: Any) -> Engine:
    engine = Engine(base, mode=mode)
    for name in names:
        engine.begin(name, *ADAPTERS[name], total_steps=STEPS, seed=7)
    return engine


Interfere = Callable[[Engine, str, int], None]


def trained(
    base: BaseModel,
    names: tuple[str, ...],
    mode: Any = "exact",
    *,
    interfere: Interfere = lambda engine, name, step: None,
) -> dict[str, dict[str, bytes]]:
    """All trained in turns, micro-batch by micro-batch; of each its weights and optimizer state."""
    engine = begun(base, names, mode)
    accumulation = {name: ADAPTERS[name][1].gradient_accumulation_steps for name in names}
    for step in range(STEPS):
        for place in range(max(accumulation.values())):
            due = [n for n in names if place < accumulation[n] and n in engine.learning()]
            for name in due:
                interfere(engine, name, step)
            due = [n for n in due if n in engine.learning()]
            found = engine.forward_backward({n: micro_batch(n, step, place) for n in due})
            for name, passed in found.items():
                if passed.fault is not None:
                    engine.end(name)
        for name in [n for n in names if n in engine.learning()]:
            try:
                engine.optim_step(name)
            except DivergedError:
                engine.end(name)
    ends = {}
    for name in engine.learning():
        trainee = engine._learning(name)
        ends[name] = {key: t.numpy().tobytes() for key, t in trainee.tensors().items()}
        assert trainee.step == STEPS
        engine.end(name)
    return ends


@pytest.fixture(scope="module")
def alone(base: BaseModel) -> dict[str, dict[str, bytes]]:
    return {name: trained(base, (name,))[name] for name in ADAPTERS}


def test_four_trained_at_once_end_as_the_four_trained_alone(
    base: BaseModel, alone: dict[str, dict[str, bytes]]
) -> None:
    assert trained(base, tuple(ADAPTERS)) == alone
    assert len({tuple(end.values()) for end in alone.values()}) == 4


@pytest.fixture
def poisoned(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let what goes wrong go wrong in every pass that reads `y`."""
    hidden = BaseModel.hidden

    def spoil(how: str) -> None:
        def spoiled(self: BaseModel, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            reads = "y" in self.route.adapters and torch.is_grad_enabled()
            if reads and how == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            if reads and how == "slow":
                time.sleep(0.01)
            return hidden(self, ids, positions)

        monkeypatch.setattr(BaseModel, "hidden", spoiled)

    return spoil


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("what", ["NaN", "memory", "cancelled", "slow"])
def test_what_happens_to_y_leaves_x_alone(
    base: BaseModel,
    alone: dict[str, dict[str, bytes]],
    poisoned: Callable[[str], None],
    mode: str,
    what: str,
) -> None:
    def interfere(engine: Engine, name: str, step: int) -> None:
        if name != "y" or step < 1:
            return
        if what == "cancelled":
            engine.end("y")
        elif what == "NaN":
            with torch.no_grad():
                parameters = engine._learning("y").parameters
                next(iter(parameters.values())).fill_(torch.nan)

    poisoned(what)
    ends = trained(base, ("x", "y"), mode, interfere=interfere)
    if mode == "exact":
        assert ends["x"] == alone["x"]
        assert what != "slow" or ends["y"] == alone["y"]
    else:
        assert apart(ends["x"], alone["x"]) < WEIGHTS_BOUND
    assert ("y" in ends) == (what in ("slow", "NaN"))


def apart(one: dict[str, bytes], other: dict[str, bytes]) -> float:
    """Largest difference of a weight, against the largest weight of its tensor."""

    def differences() -> Iterator[float]:
        for name in one:
            if name.startswith("parameter/"):
                a, b = (np.frombuffer(each[name], np.float32) for each in (one, other))
                assert np.isfinite(a).all(), name
                yield float(np.abs(a - b).max() / np.abs(b).max())

    return max(differences())


def test_a_shared_pass_gives_each_its_own_sums_and_gradients_within_the_bound(
    base: BaseModel,
) -> None:
    """One pass over all four: dropout, head and trained copies included."""
    names = tuple(ADAPTERS)
    batches = {name: micro_batch(name, 0, 0) for name in names}
    found = {}
    for mode in ("exact", "fast"):
        engine = begun(base, names, mode)
        passed = engine.forward_backward(batches)
        found[mode] = {
            name: (
                float(passed[name].total),
                passed[name].count,
                [p.grad.clone() for p in engine._learning(name).parameters.values()],
            )
            for name in names
        }
        for name in names:
            engine._learning(name).drop()
            engine.end(name)
    for name in names:
        total, count, gradients = found["exact"][name]
        shared_total, shared_count, shared = found["fast"][name]
        assert shared_count == count == batches[name].trained_tokens
        assert abs(shared_total - total) < BOUND * abs(total)
        for one, other in zip(gradients, shared, strict=True):
            assert float((one - other).norm()) <= BOUND * float(one.norm())


def test_dropout_of_x_does_not_depend_on_who_stands_before_it(base: BaseModel) -> None:
    """`fast`, with another neighbour in front: the inputs that x drops are the same ones."""
    totals = []
    for names in (("x", "y"), ("head", "x"), ("x",)):
        engine = begun(base, names, "fast")
        passed = engine.forward_backward({name: micro_batch(name, 0, 0) for name in names})
        totals.append(float(passed["x"].total))
        for name in names:
            engine._learning(name).drop()
            engine.end(name)
    assert totals[0] == pytest.approx(totals[2], rel=BOUND)
    assert totals[1] == pytest.approx(totals[2], rel=BOUND)


def test_rows_that_share_no_pass_do_not_fit_alone_either(
    base: BaseModel, poisoned: Callable[[str], None]
) -> None:
    poisoned("memory")
    engine = begun(base, ("x", "y"), "fast")
    one = micro_batch("y", 0, 0)
    found = engine.forward_backward({"x": micro_batch("x", 0, 0), "y": replace(one)})
    assert found["x"].fault is None
    assert isinstance(found["y"].fault, MemoryExhausted)
    engine.optim_step("x")
    for name in ("x", "y"):
        engine.end(name)
