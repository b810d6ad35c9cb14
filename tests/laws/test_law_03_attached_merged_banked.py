"""Law 3: attached = merged = banked logits, within a tolerance that is never relaxed.

The tolerance is 2e-5 of the largest logit. In float32 each product of the tiny models sums up to
64 terms and rounds at 6e-8; W x + B(A x) and (W + B A) x round in different places, some twenty
times over two layers, norms and the head, and differences grow through the softmax: 2e-6 of the
largest logit is what is seen, 2e-5 leaves room for other processors. A forgotten scaling, a
transposed factor or a wrong module is beyond 1e-2.
"""

from __future__ import annotations

import pytest
import torch
from tests.conftest import FAMILIES

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.lora import Adapter, adapter_of, attach, detach, trained_parameters
from pennyweight.merge import merge
from pennyweight.model import BaseModel, load_base

TOLERANCE = 2e-5
LENGTHS = (17, 9, 23, 12, 17)
GENERATOR = torch.Generator().manual_seed(1)
ROWS = [torch.randint(0, 280, (length,), generator=GENERATOR) for length in LENGTHS]

CONFIGS = {
    "wide": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    "narrow": LoraConfig(r=2, lora_alpha=8, target_modules="attention", use_rslora=True),
    "mixed.v2": LoraConfig(r=4, target_modules="mlp", rank_pattern={r".*\.1\..*": 1}),
}
IN_ONE_ROW: tuple[str | None, ...] = ("wide", "narrow", None, "mixed.v2", "narrow")


def base_of(folder: object, quantization: str) -> BaseModel:
    return load_base(BaseConfig(model=str(folder), quantization=quantization, device="cpu"))


def logits(base: BaseModel, rows: list[torch.Tensor], names: tuple[str | None, ...]):
    """All rows in one flat row, each with its own adapter; the logits of each apart."""
    lengths = [len(row) for row in rows]
    boundaries = (0, *torch.tensor(lengths).cumsum(0).tolist())
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.inference_mode(), base.route.over(boundaries, names):
        return base.logits(base.hidden(torch.cat(rows), positions)).split(lengths)


def trained_adapter(base: BaseModel, name: str, config: LoraConfig) -> Adapter:
    """An adapter as if trained: both factors far from zero."""
    attach(base, config, name=name)
    with torch.no_grad():
        for parameter in trained_parameters(base, name).values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return adapter_of(base, name, config)


def far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attached_merged_banked(tiny_model_folder, tmp_path, family, quantization):
    folder = tiny_model_folder(family)
    bank = base_of(folder, quantization)
    adapters = {name: trained_adapter(bank, name, config) for name, config in CONFIGS.items()}
    banked = logits(bank, ROWS, IN_ONE_ROW)
    bare = logits(bank, ROWS, (None,) * len(ROWS))
    one, merged, attached = base_of(folder, quantization), {}, {}
    for name, adapter in adapters.items():
        attach(one, adapter)
        report = merge(one, adapter, tmp_path / name)
        assert report.modules == len(adapter.factors)
        assert report.update_kept == pytest.approx(1, abs=1e-4)
        merged[name] = base_of(tmp_path / name, "none")
        attached[name] = [logits(one, [row], ("default",))[0] for row in ROWS]
        detach(one, "default")
    for at, (name, in_bank) in enumerate(zip(IN_ONE_ROW, banked, strict=True)):
        bound = TOLERANCE * float(in_bank.abs().max())
        if name is None:
            assert far(in_bank, bare[at]) <= bound
            continue
        (folded,) = logits(merged[name], [ROWS[at]], (None,))
        assert far(attached[name][at], in_bank) <= bound
        assert far(attached[name][at], folded) <= bound
        assert far(attached[name][at], bare[at]) > 500 * bound
