"""Law 4: one batch of 8 = 8 of 1 = packed = padded: same count, same loss sum, same gradients.

The reference is transformers' own eager forward on rows padded to the right, with full logits, in
float64. Every backend, every family, every weight of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.data.batch import Batch, collate
from pennyweight.data.conversation import Example
from pennyweight.lora import attach, trained_parameters
from pennyweight.loss import summed_cross_entropy
from pennyweight.model import BaseModel, load_base
from pennyweight.optim import adamw
from pennyweight.train import Trainee

LENGTHS = (5, 13, 2, 20, 20, 1, 9, 17)
IGNORED = -100
# Relative to the largest entry. Softmax and norms are float32 on both sides.
BOUND = 1e-5


@pytest.fixture
def examples() -> list[Example]:
    draw = np.random.default_rng(0)
    return [
        Example(
            draw.integers(5, 288, length).astype(np.int32),
            draw.random(length) < 0.6,
            f"rows.jsonl:{number + 1}",
            length,
        )
        for number, length in enumerate(LENGTHS)
    ]


def ways(examples: Sequence[Example]) -> dict[str, list[Batch]]:
    return {
        "one batch of 8": [collate(examples)],
        "8 of 1": [collate([example]) for example in examples],
        "packed": [collate([examples[i] for i in row]) for row in [(3, 2), (0, 7, 1, 5), (6, 4)]],
    }


def summed(base: BaseModel, batches: Sequence[Batch], adapter: str | None) -> tuple[Tensor, int]:
    """Loss sum and count over the batches; gradients are left in the parameters."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        with base.route.over(batch.boundaries, [adapter] * len(batch.sources)):
            hidden = base.hidden(batch.ids, batch.positions)
            part, n = summed_cross_entropy(
                hidden, batch.ids, batch.trained, batch.boundaries, base.head, chunk_tokens=7
            )
            torch.autograd.backward(part)
        total, count = total + part.detach(), count + n
    return total, count


def padded(folder: Path, examples: Sequence[Example]) -> tuple[Tensor, int, dict[str, Tensor]]:
    """The same from transformers: rows padded to the longest, logits shifted against labels.

    Causal attention alone keeps padding at the end out. A mask on top makes whole rows of padding
    NaN in transformers where a window holds nothing else, in float64.
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float64
    ).eval()
    longest = max(LENGTHS)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for row, example in enumerate(examples):
        length = len(example.ids)
        ids[row, :length] = torch.from_numpy(example.ids.astype(np.int64))
        labels[row, :length][torch.from_numpy(example.trained)] = ids[row, :length][
            torch.from_numpy(example.trained)
        ]
    logits = model(input_ids=ids, use_cache=False).logits
    wanted = labels[:, 1:]
    total = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    torch.autograd.backward(total)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return total.detach(), int((wanted != IGNORED).sum()), found


@pytest.mark.parametrize(
    "family",
    sorted(
        (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "phi3",
            "stablelm",
            "stablelm_12b",
            "gemma2",
            "gemma3",
            "gpt2",
        )
    ),
)
def test_batching_changes_neither_loss_nor_gradient(
    family: str, tiny_model_folder: Callable[[str], Path], examples: list[Example]
) -> None:
    folder = tiny_model_folder(family)
    expected, expected_count, gradients = padded(folder, examples)
    base = load_base(
        BaseConfig(model=str(folder), quantization="none", device="cpu"), trainable=True
    )
    base.module.double()
    base.dtype = torch.float64
    for backend in ("documents", "masked", "eager"):
        base.route.backend = backend
        for way, batches in ways(examples).items():
            base.module.zero_grad()
            total, count = summed(base, batches, None)
            assert count == expected_count, (backend, way)
            assert count == sum(batch.trained_tokens for batch in batches)
            torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
            for name, parameter in base.module.named_parameters():
                assert parameter.grad is not None, name
                scale = float(gradients[name].abs().max())
                torch.testing.assert_close(
                    parameter.grad, gradients[name], rtol=0, atol=BOUND * scale + 1e-12
                )


def test_an_adapter_on_a_quantized_base_steps_alike_however_cut(
    tiny_llama_folder: Path, examples: list[Example]
) -> None:
    base = load_base(BaseConfig(model=str(tiny_llama_folder), quantization="nf4", device="cpu"))
    attach(base, LoraConfig(r=4), seed=1)
    parameters = trained_parameters(base, "default")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += torch.randn_like(parameter) * 0.05
    steps = []
    for batches in ways(examples).values():
        trainee = Trainee(base, parameters, adamw(parameters), learning_rate_at=lambda _: 0.0)
        for batch in batches:
            trainee.forward_backward(batch)
        steps.append(trainee.optim_step())
    for step in steps[1:]:
        assert step.trained_tokens == steps[0].trained_tokens
        assert step.loss == pytest.approx(steps[0].loss, rel=1e-6)
        assert step.grad_norm == pytest.approx(steps[0].grad_norm, rel=1e-5)
