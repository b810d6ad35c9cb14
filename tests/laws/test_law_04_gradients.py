"""Law 4, the arithmetic half: gradients lie at least as close to float64's as PEFT's do.

Both sides take the same float32 weights and adapter; the reference is PEFT in float64. Ours are
written out by hand, so a wrong term would show here long before a loss curve does.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.lora import adapter_of, attach, described, trained_parameters
from pennyweight.loss import summed_cross_entropy
from pennyweight.model import load_base

CONFIG = LoraConfig(r=4, lora_alpha=8)
# Rounding falls out one way or the other; a wrong term costs far more than this.
ROOM = 1.5


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "stablelm", "gemma2"])
def test_as_close_to_float64_as_peft(
    family: str, tiny_model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    folder = tiny_model_folder(family)
    base = load_base(BaseConfig(model=str(folder), quantization="none", device="cpu"))
    attach(base, CONFIG)
    parameters = trained_parameters(base, "default")
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    described(adapter_of(base, "default", CONFIG), base).save(tmp_path)
    ids = torch.randint(5, 288, (24,))
    with base.route.over((0, 24), ("default",)):
        total, _ = summed_cross_entropy(
            base.hidden(ids, torch.arange(24)),
            ids,
            torch.ones(24, dtype=torch.bool),
            (0, 24),
            base.head,
        )
        total.backward()
    ours = {name: p.grad for name, p in parameters.items()}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which are not adapted here
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        theirs = peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=True).eval()
    exact = gradients(copy.deepcopy(theirs).double(), ids)
    one, two = apart(ours, exact), apart(gradients(theirs, ids), exact)
    assert one < 1e-5
    assert one <= ROOM * two


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Of the summed loss, by the names that ours have."""
    logits = model(input_ids=ids[None]).logits[0, :-1]
    nn.functional.cross_entropy(logits, ids[1:], reduction="sum").backward()
    return {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def apart(some: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Length of the difference of all gradients together, as a share of the exact ones' length."""
    assert some.keys() == exact.keys()
    differences = [(some[name].double() - exact[name]).square().sum() for name in exact]
    return float((sum(differences) / sum(e.square().sum() for e in exact.values())).sqrt())
