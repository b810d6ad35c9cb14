"""Adapters beside a base of the same shapes that is another one: refused, in seconds for a gigabyte."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from campaigns.small_run import build_model
from campaigns.tally import Tally
from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.errors import AdapterError
from pennyweight.lora import Adapter, adapter_of, attach, attached, described
from pennyweight.model import fingerprint, load_base

__all__ = ["run"]

BASES = 5  # each adapter beside each of the four others: twenty pairs
GIGABYTE, LIMIT_S = 2**30, 2.0


def run(tally: Tally, cases: int | None) -> None:
    bases = [_base(tally.folder / f"model-{n}", n) for n in range(BASES if cases is None else 2)]
    adapters = []
    for number, base in enumerate(bases):
        config = LoraConfig(r=2, target_modules=("q_proj",))
        attach(base, config, name="own")
        made = described(adapter_of(base, "own", config), base)
        adapters.append(Adapter.load(made.save(tally.folder / f"adapter-{number}")))
    for a, adapter in enumerate(adapters):
        for b, base in enumerate(bases):
            if a != b:
                tally.case(f"adapter {a} beside base {b}", _refused(base, adapter))
    if cases is None:
        tally.case("one weight of a gigabyte changed", _gigabyte(tally))


def _base(folder: Path, number: int) -> Any:
    """The same shapes and names, other weights; in number 1 only one weight of one layer."""
    build_model(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(number)
    for key in sorted(tensors)[: 1 if number == 1 else len(tensors)]:
        if number == 1:
            tensors[key].view(-1)[0] += 1e-3
        elif number:
            tensors[key] += torch.randn(tensors[key].shape, generator=generator) * 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load_base(BaseConfig(model=str(folder), quantization="none", device="cpu"))


def _refused(base: Any, adapter: Adapter) -> str | None:
    before = attached(base)
    try:
        attach(base, adapter, name="other")
    except AdapterError as refused:
        good = "was trained beside" in str(refused) and attached(base) == before
        return None if good else f"refused otherwise: {refused}"
    return "not refused"


def _gigabyte(tally: Tally) -> str | None:
    """A base of 1 GB of noise, and the same with every weight of one layer trained a little."""
    one, other = tally.folder / "large", tally.folder / "larger"
    one.mkdir()
    layers = 64
    tensors = {f"l{n}.weight": torch.randn(1024, GIGABYTE // layers // 4096) for n in range(layers)}
    save_file(tensors, one / "model.safetensors")
    tensors["l9.weight"] += 1e-4
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    (one / "config.json").write_text(json.dumps({}))
    began = time.monotonic()
    first = fingerprint(one)
    took = time.monotonic() - began
    second = fingerprint(other)
    shutil.rmtree(one)
    shutil.rmtree(other)
    tally.remark(f"the fingerprint of 1 GB took {took:.2f} s")
    if first == second:
        return "the same fingerprint"
    return None if took < LIMIT_S else f"took {took:.2f} s"
