"""The peers' side of the steps: PEFT over transformers and bitsandbytes, eager and compiled, and TRL's
SFTTrainer. Products run in float32, the fastest type on a CPU without bf16 units, but in `lora16`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks.peft_oracle import IGNORED, four_bit_model, padded
from benchmarks.steps.cases import ADAPTERS, ALPHA, RANK
from pennyweight.data.conversation import Example

__all__ = ["Peft", "Trl"]

_LORA: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}


def _model(folder: Path, mode: str) -> nn.Module:
    if mode in {"qlora", "adapters"}:
        return four_bit_model(folder)
    dtype = torch.bfloat16 if mode == "lora16" else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu")


class Peft:
    """A plain loop: the model's own loss, clip, fused AdamW, each as a reader of PEFT's examples would."""

    def __init__(self, *, compiled: bool) -> None:
        self._compiled = compiled
        self.drop()

    def drop(self) -> None:
        self._model: Any = None
        self._run: Any = None
        self._optimizers: dict[str, torch.optim.Optimizer] = {}

    def load(self, model: Path, mode: str) -> None:
        loaded = _model(model, mode)
        names = [f"a{i}" for i in range(ADAPTERS)] if mode == "adapters" else ["default"]
        if mode != "full":
            loaded = get_peft_model(loaded, LoraConfig(**_LORA), adapter_name=names[0])
            for name in names[1:]:
                loaded.add_adapter(name, LoraConfig(**_LORA))
        loaded.train()
        self._model = loaded
        self._run = torch.compile(loaded) if self._compiled else loaded
        self._optimizers = {}
        for name in names:
            if mode == "adapters":
                loaded.set_adapter(name)
            trained = [p for p in loaded.parameters() if p.requires_grad]
            self._optimizers[name] = torch.optim.AdamW(
                trained, lr=1e-4, weight_decay=0.0, fused=True
            )

    def take(
        self, rows: Sequence[Example], layout: str, steps: int, warmed: Callable[[int], None]
    ) -> list[tuple[float, float]]:
        alone = len(self._optimizers) == 1
        batches = [rows] if alone else [[row] for row in rows]
        inputs = [_inputs(each, packed="packed" in layout) for each in batches]
        taken = []
        for number in range(1, steps + 1):
            began = time.perf_counter()
            losses = list(map(self._step, inputs, self._optimizers))
            taken.append((time.perf_counter() - began, sum(losses) / len(losses)))
            warmed(number)
        return taken

    def _step(self, inputs: dict[str, Tensor], name: str) -> float:
        optimizer = self._optimizers[name]
        if len(self._optimizers) > 1:
            self._model.set_adapter(name)
        optimizer.zero_grad()
        loss = self._run(**inputs).loss
        loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()


def _inputs(rows: Sequence[Example], *, packed: bool) -> dict[str, Tensor]:
    """Padded at the right; or in one row, with positions by which transformers keeps documents apart."""
    if not packed:
        ids, mask, labels = padded(rows)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    ids, labels, positions = [], [], []
    for row in rows:
        one, _, label = padded([row])
        label[0, 0] = IGNORED
        ids.append(one)
        labels.append(label)
        positions.append(torch.arange(len(row.ids))[None])
    return {
        "input_ids": torch.cat(ids, 1),
        "labels": torch.cat(labels, 1),
        "position_ids": torch.cat(positions, 1),
    }


class Trl:
    """SFTTrainer as it comes, on rows that are tokenized already; a step's time by its own callbacks."""

    def __init__(self) -> None:
        self.drop()

    def drop(self) -> None:
        self._folder, self._mode = Path(), ""

    def load(self, model: Path, mode: str) -> None:
        self._folder, self._mode = model, mode

    def take(
        self, rows: Sequence[Example], layout: str, steps: int, warmed: Callable[[int], None]
    ) -> list[tuple[float, float]]:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer

        seconds: list[float] = []

        class Clock(TrainerCallback):
            began = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.began = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                seconds.append(time.perf_counter() - self.began)
                warmed(len(seconds))

        packed = "packed" in layout
        tokens = sum(len(row.ids) for row in rows)
        data = Dataset.from_list([_tokenized(row) for row in rows] * steps)
        with tempfile.TemporaryDirectory() as out:
            settings = SFTConfig(
                output_dir=out, max_length=tokens if packed else 512, packing=packed, use_cpu=True,
                bf16=False, per_device_train_batch_size=1 if packed else len(rows), max_steps=steps,
                learning_rate=1e-4, gradient_checkpointing=False, report_to="none",
                logging_steps=1, save_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            trainer = SFTTrainer(
                model=_model(self._folder, self._mode), args=settings, train_dataset=data,
                peft_config=LoraConfig(**_LORA), callbacks=[Clock()],
            )  # fmt: skip
            trainer.train()
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return list(zip(seconds, logged, strict=True))


def _tokenized(row: Example) -> dict[str, list[int]]:
    pairs = zip(row.ids.tolist(), row.trained.tolist(), strict=True)
    return {
        "input_ids": row.ids.tolist(),
        "labels": [token if trained else IGNORED for token, trained in pairs],
    }
