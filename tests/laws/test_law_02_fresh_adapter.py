"""Law 2: a fresh adapter leaves the logits bit-identical; after N steps the base's bytes are unchanged."""

from __future__ import annotations

import hashlib

import pytest
import torch
from tests.conftest import FAMILIES

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.lora import attach, trained_parameters
from pennyweight.model import BaseModel, load_base

IDS = torch.randint(0, 280, (24,), generator=torch.Generator().manual_seed(1))


def logits(base: BaseModel, adapter: str | None) -> torch.Tensor:
    with base.route.over((0, len(IDS)), (adapter,)):
        return base.logits(base.hidden(IDS, torch.arange(len(IDS))))


def base_bytes(base: BaseModel) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(base.module.state_dict().items()):
        if ".adapters." not in name:
            digest.update(name.replace(".base_layer", "").encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("quantization", ["none", "int8", "nf4", "fp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_adapter_changes_nothing(tiny_model_folder, family, quantization):
    base = load_base(
        BaseConfig(model=str(tiny_model_folder(family)), quantization=quantization, device="cpu")
    )
    with torch.no_grad():
        before = logits(base, None)
        attach(base, LoraConfig(r=4))
        assert torch.equal(logits(base, "default"), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_leaves_the_base_alone(tiny_model_folder, family):
    base = load_base(BaseConfig(model=str(tiny_model_folder(family)), device="cpu"))
    attach(base, LoraConfig(r=4))
    before = base_bytes(base)
    parameters = trained_parameters(base, "default")
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(logits(base, "default")[:-1], IDS[1:])
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(p.detach().any() for p in parameters.values())
    assert base_bytes(base) == before
