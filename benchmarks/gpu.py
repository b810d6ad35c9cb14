"""The memory that `plan` says before a run, beside what a GPU counted, on Llama shapes of 1B and 8B.

    python -m benchmarks.gpu [--results FOLDER] [--deadline SECONDS] [--only TEXT]
    python -m benchmarks.gpu --dry-run              # the same rows, predicted only
    python -m benchmarks.gpu --device cpu --tiny    # the same code on a toy; says nothing about size

Random weights, adapters of rank 16 on all linear layers, one row a step, two optimizer steps. Each
row of the table is written as soon as it is measured. Exit code 2: no GPU is here, nothing was
done; 1: a case failed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.machine import circumstances, in_words
from benchmarks.random_llama import SHAPES, fill_with_noise, write_hollow
from pennyweight.config import BaseConfig, DataConfig, LoraConfig, RunConfig, TrainConfig

__all__ = ["Case", "cases", "main", "measured"]

PACKAGES = ("pennyweight", "torch", "triton", "transformers")
STEPS = 2
HEADER = (
    "| model | method | tokens | policy | planned, bytes | measured, bytes | ratio |\n"
    "|---|---|---:|---|---:|---:|---:|\n"
)


@dataclass(frozen=True, slots=True)
class Case:
    """One run: this model, trained this way on a row of so many tokens."""

    model: str
    method: str
    tokens: int
    recompute: bool

    @property
    def name(self) -> str:
        recompute = ", recompute" if self.recompute else ""
        return f"{self.model} {self.method} {self.tokens}{recompute}"

    def config(self, folder: Path, device: str) -> RunConfig:
        return RunConfig(
            base=BaseConfig(
                model=str(folder),
                device=device,
                dtype="float32" if device == "cpu" else "bfloat16",
                quantization="nf4" if self.method == "qlora" else "none",
            ),
            adapter=LoraConfig(r=16),
            data=DataConfig(max_length=self.tokens),
            train=TrainConfig(
                method=self.method,  # type: ignore[arg-type]
                batch_size=1,
                gradient_checkpointing=self.recompute,
            ),
        )


def cases(*, tiny: bool) -> Iterator[Case]:
    """Small before large, so that what goes wrong costs least."""
    models, lengths = (("tiny",), (128, 256)) if tiny else (("1B", "8B"), (2048, 8192))
    for model, method, tokens, recompute in product(
        models, ("qlora", "lora"), lengths, (False, True)
    ):
        yield Case(model, method, tokens, recompute)


class Table:
    """A page that rows are added to, a section for each time it is run."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device, self.begun = path, device, False

    def add(self, case: Case, predicted: Any, found: int | None, note: str = "") -> None:
        """One row at once on the disk and on the screen; `found` is None where `note` says why."""
        ratio = "" if found is None else f"{predicted.counted_peak_bytes / found:.3f}"
        cells = (
            *(case.model, case.method, f"{case.tokens:,}", predicted.recompute),
            *(f"{predicted.counted_peak_bytes:,}", note or f"{found:,}", ratio),
        )
        row = "| " + " | ".join(cells) + " |\n"
        print(row, end="", flush=True)
        text = row
        if not self.begun:
            self.begun = True
            title = "" if self.path.exists() else f"# Planned and measured memory\n\n{__doc__}\n"
            text = (
                f"{title}\n## {self.device}\n\n{in_words(circumstances(PACKAGES))}\n\n{HEADER}{row}"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)


def measured(base: Any, case: Case, config: RunConfig) -> int:
    """The device's high-water mark over two steps on a loaded base, which is left as it was."""
    import torch

    from pennyweight.data.batch import Batch
    from pennyweight.lora import attach, detach, trained_parameters
    from pennyweight.optim import adamw
    from pennyweight.train import (
        Trainee,
        disable_checkpointing,
        enable_checkpointing,
        peak_memory_bytes,
    )

    _restart_peak(base.device)
    attach(base, config.adapter, seed=0)
    if case.recompute:
        enable_checkpointing(base)
    try:
        parameters = dict(trained_parameters(base, "default"))
        trainee = Trainee(base, parameters, adamw(parameters), learning_rate_at=lambda step: 1e-4)
        drawn = torch.Generator().manual_seed(0)
        batch = Batch(
            ids=torch.randint(0, base.vocab_size, (case.tokens,), generator=drawn),
            trained=torch.ones(case.tokens, dtype=torch.bool),
            positions=torch.arange(case.tokens),
            boundaries=(0, case.tokens),
            adapters=("default",),
            sources=("random",),
        )
        for _ in range(STEPS):
            trainee.forward_backward(batch)
            trainee.optim_step()
        found = peak_memory_bytes(base.device)
    finally:
        if case.recompute:
            disable_checkpointing(base)
        detach(base, "default")
    assert found is not None
    return found


def _restart_peak(device: Any) -> None:
    import torch

    from pennyweight.train import release_cached, restart_peak

    gc.collect()
    release_cached(device)
    restart_peak(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def run(chosen: list[Case], table: Table, device: str, *, deadline: float) -> int:
    """Every case in turn, one base resident at a time; the exit code."""
    from pennyweight.model import load_base
    from pennyweight.plan import plan

    failed, held = 0, None
    base: Any = None
    with tempfile.TemporaryDirectory() as work:
        for case in chosen:
            folder = Path(work) / case.model
            if not folder.exists():
                write_hollow(SHAPES[case.model], folder)
            config = case.config(folder, device)
            predicted = plan(config)
            if time.monotonic() > deadline:
                table.add(case, predicted, None, "no time left")
                continue
            try:
                if held != (case.model, case.method):
                    base = None
                    gc.collect()
                    base, held = load_base(config.base), (case.model, case.method)
                    fill_with_noise(base, seed=0)
                table.add(case, predicted, measured(base, case, config))
            except Exception as fault:  # the next case may well do; what failed stays in the table
                failed, base, held = failed + 1, None, None
                table.add(case, predicted, None, f"{type(fault).__name__}: {str(fault).splitlines()[0][:90]}")  # fmt: skip
    return 1 if failed else 0


def predict(chosen: list[Case], device: str) -> int:
    """The table's left half, for this machine's GPU or an H200."""
    from pennyweight.plan import named_device, plan

    with tempfile.TemporaryDirectory() as work:
        for case in chosen:
            folder = write_hollow(SHAPES[case.model], Path(work) / case.model)
            said = plan(case.config(folder, device), device=named_device(device if device == "cpu" else "h200"))  # fmt: skip
            print(f"{case.name:28} {said.recompute:9} {said.counted_peak_bytes / 1e9:7.2f} GB")
    return 0


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--deadline", type=float, default=480.0, help="begin no case after so many seconds")  # fmt: skip
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    parser.add_argument("--dry-run", action="store_true", help="predict only")
    asked = parser.parse_args(words)
    deadline = time.monotonic() + asked.deadline
    chosen = [case for case in cases(tiny=asked.tiny) if asked.only in case.name]
    if asked.dry_run:
        return predict(chosen, asked.device)
    import torch

    if asked.device == "cuda" and not torch.cuda.is_available():
        print("gpu: no CUDA device is here; nothing was done", file=sys.stderr)
        return 2
    if asked.device == "cpu" and not asked.tiny:
        parser.error("on a CPU only --tiny: the shapes of a GPU would take hours")
    if asked.device == "cpu" and asked.results == parser.get_default("results"):
        parser.error("a CPU's figures do not belong in the committed table: name --results FOLDER")
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU, toy shapes"
    return run(chosen, Table(asked.results / "gpu-plan.md", name), asked.device, deadline=deadline)


if __name__ == "__main__":
    sys.exit(main())
