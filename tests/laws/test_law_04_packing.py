"""Law 4, the attention half: documents packed in one row = each document alone, on every backend.

The reference is transformers' own eager attention, one document at a time. Everything runs in
float64, but for norms and rotations, and the softmax of the reference, which transformers
computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pennyweight.config import BaseConfig
from pennyweight.model import BaseModel, load_base

FAMILIES = (
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
# Longer and shorter than the families' windows of 8 tokens, neighbours of equal length, one of 1.
LENGTHS = (5, 13, 1, 20, 20)
BOUND = 1e-5


def packed(base: BaseModel, documents: Sequence[Tensor]) -> Tensor:
    boundaries = [0]
    for document in documents:
        boundaries.append(boundaries[-1] + len(document))
    positions = torch.cat([torch.arange(len(document)) for document in documents])
    with base.route.over(boundaries, [None] * len(documents)):
        return base.hidden(torch.cat(list(documents)), positions)


def in_float64(folder: Path) -> BaseModel:
    base = load_base(BaseConfig(model=str(folder), quantization="none", device="cpu"))
    base.module.double()
    base.dtype = torch.float64
    return base


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_apart_on_every_backend(
    family: str, tiny_model_folder: Callable[[str], Path]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder(family)
    alone = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float64
    ).eval()
    documents = [torch.randint(5, 288, (length,)) for length in LENGTHS]
    expected = torch.cat([alone.base_model(d[None]).last_hidden_state[0] for d in documents])
    readout = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(
        (expected * readout).sum(), alone.get_input_embeddings().weight
    )

    base = in_float64(folder)
    weight = base.module.get_input_embeddings().weight.requires_grad_(True)
    for backend in ("auto", "documents", "masked", "eager"):
        base.route.backend = backend
        hidden = packed(base, documents)
        torch.testing.assert_close(hidden, expected, rtol=0, atol=BOUND)
        (found,) = torch.autograd.grad((hidden * readout).sum(), weight)
        torch.testing.assert_close(found, gradient, rtol=0, atol=BOUND * gradient.abs().max())
