"""Recomputed layers keep less, batches come apart in whole documents, marks are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.data.batch import Batch
from pennyweight.lora import attach
from pennyweight.loss import summed_cross_entropy
from pennyweight.model import BaseModel, load_base
from pennyweight.train import disable_checkpointing, enable_checkpointing
from pennyweight.train.memory import (
    is_out_of_memory,
    parts,
    peak_memory_bytes,
    restart_peak,
    saved_bytes,
)

BatchOf = Callable[..., Batch]


def kept(base: BaseModel, batch: Batch) -> int:
    with base.route.over(batch.boundaries, batch.adapters):
        return saved_bytes(
            lambda: base.hidden(batch.ids, batch.positions), besides=base.module.parameters()
        )


def test_recomputed_layers_keep_their_inputs_only(base: BaseModel, batch_of: BatchOf) -> None:
    batch = batch_of(7, 8, 9)
    usual = kept(base, batch)
    enable_checkpointing(base)
    assert kept(base, batch) < usual / 3
    disable_checkpointing(base)
    assert kept(base, batch) == usual


@pytest.mark.parametrize("family", ["qwen3", "phi3", "stablelm", "gemma2", "gemma3", "gpt2"])
def test_every_family_recomputes_to_the_same_gradient(
    tiny_model_folder: Callable[[str], Path], batch_of: BatchOf, family: str
) -> None:
    base = load_base(
        BaseConfig(model=str(tiny_model_folder(family)), quantization="none", device="cpu")
    )
    attach(base, LoraConfig(r=2, lora_dropout=0.3))
    learned = [p for p in base.module.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in learned:
            parameter += torch.randn_like(parameter) * 0.1
    batch = batch_of(3, 9)

    def gradients() -> list[torch.Tensor]:
        with base.route.over(batch.boundaries, batch.adapters, dropout_seed=5):
            hidden = base.hidden(batch.ids, batch.positions)
            total, _ = summed_cross_entropy(
                hidden, batch.ids, batch.trained, batch.boundaries, base.head
            )
            return list(torch.autograd.grad(total, learned))

    usual, usual_kept = gradients(), kept(base, batch)
    enable_checkpointing(base)
    assert kept(base, batch) < usual_kept
    for one, two in zip(usual, gradients(), strict=True):
        assert torch.equal(one, two)


def test_parts_are_whole_documents_in_order(batch_of: BatchOf) -> None:
    batch = batch_of(0, 1, 9, 2)  # 5, 7, 23 and 9 tokens
    found = parts(batch, 14)
    assert [part.sources for part in found] == [
        batch.sources[:2],
        batch.sources[2:3],
        batch.sources[3:],
    ]
    assert [part.boundaries for part in found] == [(0, 5, 12), (0, 23), (0, 9)]
    assert torch.equal(torch.cat([part.ids for part in found]), batch.ids)
    assert torch.equal(torch.cat([part.trained for part in found]), batch.trained)
    assert [int(part.positions[0]) for part in found] == [0, 0, 0]
    assert [part.adapters for part in found] == [("default",) * 2, ("default",), ("default",)]


@pytest.mark.parametrize("limit", [None, 44, 100])
def test_what_fits_stays_one(batch_of: BatchOf, limit: int | None) -> None:
    batch = batch_of(0, 1, 9, 2)
    assert parts(batch, limit) == [batch]


def test_storages_count_once() -> None:
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: (x * x).sum()) == 4000
    assert saved_bytes(lambda: (x * x).sum(), besides=[x]) == 0
    assert saved_bytes(lambda: x.exp().exp()) == 8000


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    )
    assert is_out_of_memory(RuntimeError("MPS backend out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_peak_only_rises() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    assert before is not None
    assert before > 50e6
    held = torch.ones(30_000_000)
    after = peak_memory_bytes(torch.device("cpu"))
    assert after is not None
    assert after >= before
    del held


def test_the_mark_of_a_cpu_run_begins_anew() -> None:
    held = torch.ones(60_000_000)
    high = peak_memory_bytes(torch.device("cpu"))
    del held
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system keeps one mark for the whole process")
    restart_peak(torch.device("cpu"))
    low = peak_memory_bytes(torch.device("cpu"))
    assert high is not None
    assert low is not None
    assert low < high - 150e6
