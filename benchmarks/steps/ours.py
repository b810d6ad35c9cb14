"""This project's side of the steps: the trainee and batches that `finetune` uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.random_llama import fill_with_noise
from benchmarks.steps.cases import ADAPTERS, ALPHA, RANK, Case
from benchmarks.steps.side import synchronize
from pennyweight.config import BaseConfig, LoraConfig, RunConfig, TrainConfig
from pennyweight.data.batch import Batch, collate
from pennyweight.data.conversation import Example
from pennyweight.finetune.learner import what_learns
from pennyweight.lora import attach, trained_parameters
from pennyweight.model import load_base
from pennyweight.optim import adamw
from pennyweight.train import Trainee, disable_checkpointing, enable_checkpointing

__all__ = ["Ours"]


class Ours:
    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self.drop()

    def drop(self) -> None:
        self._base: Any = None
        self._trainees: list[Trainee] = []

    def load(self, model: Path, mode: str, *, dtype: str = "float32", hollow: bool = False) -> None:
        self._whole_model = mode == "full"
        quantized = mode in {"qlora", "adapters"}
        config = RunConfig(
            base=BaseConfig(
                model=str(model),
                quantization="nf4" if quantized else "none",
                dtype=dtype if self._device == "cpu" and mode != "lora16" else "bfloat16",  # type: ignore[arg-type]
                device=self._device,
            ),
            adapter=LoraConfig(r=RANK, lora_alpha=ALPHA),
            train=TrainConfig(method=_METHODS[mode]),  # type: ignore[arg-type]
        )
        self._base = base = load_base(config.base, trainable=self._whole_model)
        if hollow:
            fill_with_noise(base, seed=0)
        if mode == "adapters":
            names = [f"a{i}" for i in range(ADAPTERS)]
            for name in names:
                attach(base, config.adapter, name=name)
            learned = [trained_parameters(base, name) for name in names]
        else:
            learned = [what_learns(base, config)]
        self._trainees = [
            Trainee(base, each, adamw(each), learning_rate_at=lambda step: 1e-4) for each in learned
        ]

    def take(
        self, rows: Sequence[Example], case: Case, warmed: Callable[[int], None]
    ) -> list[tuple[float, float]]:
        assert "padded" not in case.layout, "nothing is padded here"
        if case.recompute:
            enable_checkpointing(self._base)
        try:
            return self._taken(self._batches(rows), case.warm + case.steps, warmed)
        finally:
            if case.recompute:
                disable_checkpointing(self._base)

    def _taken(
        self, batches: Sequence[Batch], steps: int, warmed: Callable[[int], None]
    ) -> list[tuple[float, float]]:
        taken = []
        for number in range(1, steps + 1):
            began, losses = time.perf_counter(), []
            # Each adapter's own micro-batch, interleaved: the exact mode.
            for trainee, batch in zip(self._trainees, batches, strict=True):
                trainee.forward_backward(batch)
                losses.append(trainee.optim_step().loss)
            synchronize(self._device)
            taken.append((time.perf_counter() - began, sum(losses) / len(losses)))
            warmed(number)
        return taken

    def _batches(self, rows: Sequence[Example]) -> list[Batch]:
        if len(self._trainees) > 1:
            return [collate([row], f"a{i}") for i, row in enumerate(rows)]
        return [collate(rows, None if self._whole_model else "default")]


_METHODS = {
    "full": "full",
    "lora": "lora",
    "lora16": "lora",
    "qlora": "qlora",
    "adapters": "qlora",
}
