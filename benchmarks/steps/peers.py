"""The peers' side of the steps: PEFT over transformers and bitsandbytes, eager, compiled and with
Liger's kernels; PEFT over torchao's NF4; Unsloth; and TRL's SFTTrainer. In bf16, weights that are not
quantized are bf16 and adapters float32; under autocast, as TRL does it, but for steps of so few tokens
that it is quicker without.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.peft_oracle import IGNORED, padded
from benchmarks.steps.cases import ADAPTERS, ALPHA, RANK, Case
from benchmarks.steps.side import synchronize
from pennyweight.data.conversation import Example

__all__ = ["Peft", "Trl", "Way"]

_LORA: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"}
Way = Literal["", "compiled", "liger", "torchao", "unsloth"]


# From here on autocast pays: below, its casts cost more than products in float32 of adapters.
AUTOCAST_TOKENS = 256


def _model(folder: Path, mode: str, device: str, *, dtype: str, hollow: bool) -> nn.Module:
    """On a GPU everything that is not quantized is bf16, as the peers' guides have it."""
    narrow = device != "cpu" or mode == "lora16"
    wide = torch.bfloat16 if narrow else getattr(torch, dtype)
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=wide,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=wide,
        device_map=device,
        quantization_config=quantized if mode in {"qlora", "adapters"} else None,
    )
    if hollow:
        _fill_with_noise(loaded)
    return loaded


def _fill_with_noise(model: nn.Module) -> None:
    """What `random_llama.fill_with_noise` does to our base: codes, scales and weights that are not zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                parameter.data.random_(0, 256)
                parameter.quant_state.absmax.random_(0, 256)
                parameter.quant_state.state2.absmax.fill_(0.01)
                parameter.quant_state.offset.fill_(0.02)
            elif parameter.ndim == 1:
                parameter.fill_(1.0)  # norms, which would make zeros of all
            else:
                parameter.normal_(0.0, 0.01)


def _of_torchao(folder: Path, device: str, *, dtype: str, hollow: bool) -> nn.Module:
    """NF4 with double quantization as torchao has it, in plain torch operations that a compiler is to
    fuse: so a GPU's decoder layers are compiled, one by one, as torchtune's recipes do."""
    from torchao.quantization import to_nf4

    model: Any = _model(folder, "lora", device, dtype=dtype, hollow=hollow)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            group = math.gcd(256, layer.weight.numel() // 64)  # 256 but in a toy
            quantized = to_nf4(layer.weight.detach(), 64, group)
            layer.weight = nn.Parameter(quantized, requires_grad=False)
    if device == "cuda":
        for layer in model.model.layers:
            layer.compile()
    return model


def _of_unsloth(folder: Path, *, hollow: bool) -> nn.Module:
    """Unsloth's loader and adapters, with its own recomputation."""
    from unsloth import FastLanguageModel

    loaded, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=32_768, dtype=torch.bfloat16, load_in_4bit=True
    )
    if hollow:
        _fill_with_noise(loaded)
    adapted: nn.Module = FastLanguageModel.get_peft_model(loaded, r=RANK, lora_alpha=ALPHA)
    return adapted


class Peft:
    """A plain loop: the model's own loss, clip, fused AdamW, each as a reader of PEFT's examples would.

    `way`: how the model is made quicker, or whose it is; `torchao` and `unsloth` know `qlora` alone.
    """

    def __init__(self, device: str = "cpu", way: Way = "") -> None:
        self._device, self._way = device, way
        self.drop()

    def drop(self) -> None:
        self._model: Any = None
        self._run: Any = None
        self._optimizers: dict[str, torch.optim.Optimizer] = {}

    def load(self, model: Path, mode: str, *, dtype: str = "float32", hollow: bool = False) -> None:
        assert mode == "qlora" or self._way not in {"torchao", "unsloth"}, mode
        names = [f"a{i}" for i in range(ADAPTERS)] if mode == "adapters" else ["default"]
        if self._way == "unsloth":
            loaded: Any = _of_unsloth(model, hollow=hollow)
        else:
            loaded = self._adapted(self._base(model, mode, dtype, hollow=hollow), mode, names)
        self._model = loaded
        loaded.train()
        self._run = torch.compile(loaded) if self._way == "compiled" else loaded
        self._optimizers = {}
        for name in names:
            if mode == "adapters":
                loaded.set_adapter(name)
            trained = [p for p in loaded.parameters() if p.requires_grad]
            self._optimizers[name] = torch.optim.AdamW(
                trained, lr=1e-4, weight_decay=0.0, fused=True
            )

    def _base(self, folder: Path, mode: str, dtype: str, *, hollow: bool) -> nn.Module:
        if self._way == "torchao":
            return _of_torchao(folder, self._device, dtype=dtype, hollow=hollow)
        loaded = _model(folder, mode, self._device, dtype=dtype, hollow=hollow)
        if self._way == "liger":
            from liger_kernel.transformers import apply_liger_kernel_to_llama

            apply_liger_kernel_to_llama(model=loaded)
        return loaded

    def _adapted(self, base: Any, mode: str, names: Sequence[str]) -> Any:
        if mode == "full":
            return base
        adapted: Any = get_peft_model(base, LoraConfig(**_LORA), adapter_name=names[0])
        for name in names[1:]:
            adapted.add_adapter(name, LoraConfig(**_LORA))
        return adapted

    def _recompute(self, on: bool) -> None:
        if self._way == "unsloth":
            from unsloth import FastLanguageModel

            FastLanguageModel.for_training(self._model, use_gradient_checkpointing=on)
        elif on:
            self._model.enable_input_require_grads()
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self._model.gradient_checkpointing_disable()

    def take(
        self, rows: Sequence[Example], case: Case, warmed: Callable[[int], None]
    ) -> list[tuple[float, float]]:
        alone = len(self._optimizers) == 1
        batches = [rows] if alone else [[row] for row in rows]
        packed = "packed" in case.layout
        inputs = [_inputs(each, self._device, packed=packed) for each in batches]
        self._recompute(case.recompute)
        taken = []
        casts = case.dtype == "bfloat16" and case.tokens >= AUTOCAST_TOKENS
        for number in range(1, case.warm + case.steps + 1):
            began = time.perf_counter()
            with torch.autocast(self._device, torch.bfloat16, enabled=casts):
                losses = list(map(self._step, inputs, self._optimizers))
            synchronize(self._device)
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


def _inputs(rows: Sequence[Example], device: str, *, packed: bool) -> dict[str, Tensor]:
    """Padded at the right; or in one row, with positions by which transformers keeps documents apart."""
    if not packed:
        ids, mask, labels = (each.to(device) for each in padded(rows))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    ids, labels, positions = [], [], []
    for row in rows:
        one, _, label = padded([row])
        label[0, 0] = IGNORED
        ids.append(one)
        labels.append(label)
        positions.append(torch.arange(len(row.ids))[None])
    return {
        "input_ids": torch.cat(ids, 1).to(device),
        "labels": torch.cat(labels, 1).to(device),
        "position_ids": torch.cat(positions, 1).to(device),
    }


class Trl:
    """SFTTrainer as it comes, on rows that are tokenized already; a step's time by its own callbacks.

    `liger`: with Liger's kernels, which need a GPU.
    """

    def __init__(self, device: str = "cpu", *, liger: bool = False) -> None:
        self._device, self._liger = device, liger
        self.drop()

    def drop(self) -> None:
        self._model: Callable[[], nn.Module] | None = None

    def load(self, model: Path, mode: str, *, dtype: str = "float32", hollow: bool = False) -> None:
        # The trainer wraps its model, so each case loads its own.
        self._model = partial(_model, model, mode, self._device, dtype=dtype, hollow=hollow)

    def take(
        self, rows: Sequence[Example], case: Case, warmed: Callable[[int], None]
    ) -> list[tuple[float, float]]:
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import SFTConfig, SFTTrainer

        assert self._model is not None
        seconds: list[float] = []
        steps, device = case.warm + case.steps, self._device

        class Clock(TrainerCallback):
            began = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.began = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                synchronize(device)
                seconds.append(time.perf_counter() - self.began)
                warmed(len(seconds))

        packed = "packed" in case.layout
        tokens = sum(len(row.ids) for row in rows)
        data = Dataset.from_list([_tokenized(row) for row in rows] * steps)
        with tempfile.TemporaryDirectory() as out:
            settings = SFTConfig(
                output_dir=out, max_length=tokens if packed else case.document, packing=packed,
                use_cpu=device == "cpu", max_steps=steps, learning_rate=1e-4,
                per_device_train_batch_size=1 if packed else len(rows), logging_steps=1,
                gradient_checkpointing=case.recompute, use_liger_kernel=self._liger,
                bf16=device == "cuda" or case.dtype == "bfloat16",
                report_to="none", save_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            trainer = SFTTrainer(
                model=self._model(), args=settings, train_dataset=data,
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
