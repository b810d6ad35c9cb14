"""Law 6: 2N steps = N + save + load in a new process + N, bit for bit.

QLoRA with dropout, packing on and off, accumulation 1, 2 and 4, with and without recomputation:
masters, moments, counters and every event are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.data.batch import Batch, collate, order
from pennyweight.data.conversation import Example
from pennyweight.lora import attach, attached, detach, trained_parameters
from pennyweight.model import BaseModel, load_base
from pennyweight.optim import adamw, lr_at
from pennyweight.train import (
    CheckpointState,
    Trainee,
    disable_checkpointing,
    enable_checkpointing,
    load_latest,
    random_tensors,
    restore_random,
    save,
    train,
)

HALF = 5
SETTINGS = [(packing, accumulation) for packing in (True, False) for accumulation in (1, 2, 4)]


def rows() -> list[Example]:
    """26 rows of 3 to 30 tokens: 9 or more micro-batches, which 2 and 4 do not divide."""
    draw = np.random.default_rng(7)
    made = []
    for number in range(26):
        length = int(draw.integers(3, 31))
        ids = draw.integers(5, 288, length).astype(np.int32)
        made.append(Example(ids, draw.random(length) < 0.7, f"rows.jsonl:{number + 1}", length))
    return made


def trainee(base: BaseModel, **kind: Any) -> Trainee:
    """A fresh adapter, as a new process would make it."""
    for name in attached(base):
        detach(base, name)
    attach(base, LoraConfig(r=4, lora_dropout=0.2, loraplus_lr_ratio=4), seed=3)
    parameters = trained_parameters(base, "default")
    schedule = partial(lr_at, peak=1e-2, total_steps=2 * HALF, warmup_steps=3, kind="cosine")
    optimizer = adamw(parameters, weight_decay=0.01, loraplus_lr_ratio=4.0, **kind)
    return Trainee(base, parameters, optimizer, learning_rate_at=schedule, seed=11)


def go_on(learner: Trainee, packing: bool, accumulation: int, steps: int) -> list[dict[str, Any]]:
    """So many steps from where the trainee stands; events without the wall clock."""
    examples = rows()
    budget, count = (64, None) if packing else (None, 3)

    def batches(epoch: int) -> list[tuple[int, ...]]:
        lengths = [len(e.ids) for e in examples]
        return order(lengths, seed=5, epoch=epoch, budget_tokens=budget, rows=count)

    def made(indices: tuple[int, ...]) -> Batch:
        return collate([examples[i] for i in indices])

    steps_made = train(learner, batches, made, total_steps=2 * HALF, accumulation=accumulation)
    return [
        {k: v for k, v in dataclasses.asdict(step).items() if k not in ("seconds", "notices")}
        for step in islice(steps_made, steps)
    ]


def digest(learner: Trainee) -> str:
    found = hashlib.sha256(json.dumps(learner.progress()).encode())
    for name, tensor in sorted(learner.tensors().items()):
        found.update(name.encode() + tensor.numpy().tobytes())
    return found.hexdigest()


def put(folder: Path, learner: Trainee) -> None:
    tensors = learner.tensors() | random_tensors()
    save(folder, CheckpointState(learner.step, tensors, learner.progress(), {}))


def take(folder: Path, learner: Trainee) -> None:
    loaded = load_latest(folder)
    assert loaded is not None
    state, passed_over = loaded
    assert passed_over == []
    learner.restore(state.tensors, state.progress)
    restore_random(state.tensors)


def loaded_base(folder: Path) -> BaseModel:
    return load_base(BaseConfig(model=str(folder), quantization="nf4", device="cpu"))


def second_half(model_folder: Path, checkpoints: Path) -> dict[str, Any]:
    """What the new process does: load each checkpoint, go on, report."""
    base = loaded_base(model_folder)
    report = {}
    for packing, accumulation in SETTINGS:
        learner = trainee(base)
        take(checkpoints / f"{packing}-{accumulation}", learner)
        events = go_on(learner, packing, accumulation, HALF)
        report[f"{packing}-{accumulation}"] = {"events": events, "digest": digest(learner)}
    return report


def test_resumed_in_a_new_process_is_uninterrupted(tiny_llama_folder: Path, tmp_path: Path) -> None:
    base = loaded_base(tiny_llama_folder)
    expected = {}
    for packing, accumulation in SETTINGS:
        learner = trainee(base)
        go_on(learner, packing, accumulation, HALF)
        put(tmp_path / f"{packing}-{accumulation}", learner)
        events = go_on(learner, packing, accumulation, HALF)
        expected[f"{packing}-{accumulation}"] = {"events": events, "digest": digest(learner)}
        assert [event["number"] for event in events] == list(range(HALF + 1, 2 * HALF + 1))
    done = subprocess.run(
        [sys.executable, __file__, str(tiny_llama_folder), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("recompute", ["none", "minimal", "offloaded"])
def test_a_cut_after_every_step_changes_nothing(
    tiny_llama_folder: Path, tmp_path: Path, recompute: Any
) -> None:
    base = loaded_base(tiny_llama_folder)
    enable_checkpointing(base, recompute)
    learner = trainee(base)
    expected = go_on(learner, True, 2, 2 * HALF)
    whole = digest(learner)
    found = []
    put(tmp_path, trainee(base))
    for _ in range(2 * HALF):
        learner = trainee(base)
        torch.rand(3)  # whatever else a process draws
        take(tmp_path, learner)
        found += go_on(learner, True, 2, 1)
        put(tmp_path, learner)
    disable_checkpointing(base)
    assert found == expected
    assert digest(learner) == whole


@pytest.mark.parametrize("kind", ["paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit"])
def test_moments_in_pages_and_in_8_bits_go_over_too(
    tiny_llama_folder: Path, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in the middle, and taken up by an optimizer whose pages lie elsewhere."""
    monkeypatch.setattr(
        "pennyweight.optim.paged.SMALLEST", 64
    )  # so that the tiny factors are 8-bit
    base = loaded_base(tiny_llama_folder)
    learner = trainee(base, kind=kind)
    expected = go_on(learner, True, 2, 2 * HALF)
    whole = digest(learner)
    learner = trainee(base, kind=kind)
    found = go_on(learner, True, 2, HALF)
    put(tmp_path, learner)
    learner = trainee(base, kind=kind, resident_bytes=0)
    take(tmp_path, learner)
    found += go_on(learner, True, 2, HALF)
    assert found == expected
    assert digest(learner) == whole


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(second_half(Path(sys.argv[1]), Path(sys.argv[2]))))
