"""Adapters as values: attach and detach, save and load, and PEFT on the other end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.errors import AdapterError
from pennyweight.lora import (
    Adapter,
    adapter_of,
    attach,
    attached,
    check_name,
    content_hash,
    described,
    detach,
    trained_parameters,
)
from pennyweight.model import load_base

IDS = torch.randint(0, 280, (20,), generator=torch.Generator().manual_seed(1))


def base_of(folder: Path, quantization: str = "none"):
    return load_base(BaseConfig(model=str(folder), quantization=quantization, device="cpu"))


def logits(base, name: str | None) -> torch.Tensor:
    with torch.inference_mode(), base.route.over((0, len(IDS)), (name,)):
        return base.logits(base.hidden(IDS, torch.arange(len(IDS))))


def shake(base, name: str = "default") -> None:
    """Make a fresh adapter one that does something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained_parameters(base, name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_attach_and_detach_are_inverse(tiny_llama_folder):
    base = base_of(tiny_llama_folder, "nf4")
    before, kinds = logits(base, None), [type(m) for m in base.module.modules()]
    attach(base, LoraConfig(r=4), name="a")
    attach(base, LoraConfig(r=2, target_modules=("q_proj",)), name="b")
    assert attached(base) == ["a", "b"]
    detach(base, "a")
    detach(base, "b")
    assert [type(m) for m in base.module.modules()] == kinds
    assert torch.equal(logits(base, None), before)


def test_names(tiny_llama_folder):
    base = base_of(tiny_llama_folder)
    attach(base, LoraConfig(r=2), name="sql-v1.2")
    with pytest.raises(AdapterError, match="attached already"):
        attach(base, LoraConfig(r=2), name="sql-v1.2")
    with pytest.raises(AdapterError, match=r"attached are: sql-v1\.2"):
        detach(base, "other")
    for bad in ("", "-a", "A", "a/b", "..", "a" * 65, "a\n"):
        with pytest.raises(AdapterError, match="adapter name"):
            check_name(bad)


def test_initial_factors_do_not_depend_on_the_other_targets(tiny_llama_folder):
    few, all_of_them = base_of(tiny_llama_folder), base_of(tiny_llama_folder)
    attach(few, LoraConfig(r=4, target_modules=("v_proj",)), seed=3)
    attach(all_of_them, LoraConfig(r=4), seed=3)
    key = "model.layers.1.self_attn.v_proj.lora_A"
    assert torch.equal(
        trained_parameters(few, "default")[key], trained_parameters(all_of_them, "default")[key]
    )


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_save_and_load_are_inverse(tiny_model_folder, tmp_path, family):
    base = base_of(tiny_model_folder(family))
    config = LoraConfig(r=4, lora_alpha=8, use_rslora=True, rank_pattern={r".*\.0\..*": 2})
    attach(base, config)
    shake(base)
    before = logits(base, "default")
    described(adapter_of(base, "default", config), base).save(tmp_path / "a")
    again = base_of(tiny_model_folder(family))
    attach(again, Adapter.load(tmp_path / "a"), name="back")
    assert torch.equal(logits(again, "back"), before)


def test_a_version_is_what_the_adapter_says_and_no_more(tiny_llama_folder, tmp_path):
    base = base_of(tiny_llama_folder)
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=("lm_head",))
    attach(base, config)
    shake(base)
    kept = described(adapter_of(base, "default", config), base)
    version = content_hash(kept)
    kept.save(tmp_path / "a")
    assert content_hash(Adapter.load(tmp_path / "a")) == version
    again = replace(Adapter.load(tmp_path / "a"), about={}, notes=("said",), base_name="moved")
    assert content_hash(again) == version
    first = next(iter(kept.factors))
    a, b = kept.factors[first]
    nudged = b.detach().clone()
    nudged.view(-1)[3] = torch.nextafter(nudged.view(-1)[3], torch.tensor(9.0))
    others = [
        replace(kept, factors=kept.factors | {first: (a, nudged)}),
        replace(kept, factors=kept.factors | {first: (a.half(), b.half())}),
        replace(kept, factors={"other": kept.factors[first]}),
        replace(kept, saved={}),
        replace(kept, config=config.model_copy(update={"lora_alpha": 17.0})),
        replace(kept, config=config.model_copy(update={"use_rslora": True})),
        replace(kept, config=config.model_copy(update={"alpha_pattern": {"q_proj": 4.0}})),
        replace(kept, base_fingerprint=None),
    ]
    assert len({version, *map(content_hash, others)}) == 1 + len(others)


@pytest.mark.parametrize("tied", [False, True])
def test_whole_modules_are_trained_and_saved(tiny_model_folder, tmp_path, tied):
    base = base_of(tiny_model_folder("qwen2" if tied else "llama"))
    config = LoraConfig(
        r=2, modules_to_save=("embed_tokens",) if tied else ("embed_tokens", "lm_head")
    )
    attach(base, config)
    plain = logits(base, None)
    assert torch.equal(logits(base, "default"), plain)
    shake(base)
    tuned = logits(base, "default")
    assert not torch.allclose(tuned, plain)
    assert torch.equal(logits(base, None), plain)
    saved = adapter_of(base, "default", config)
    assert set(saved.saved) == {"model.embed_tokens", "lm_head"}
    shared = saved.saved["model.embed_tokens"] is saved.saved["lm_head"]
    assert shared == tied
    saved.save(tmp_path / "a")
    again = base_of(tiny_model_folder("qwen2" if tied else "llama"))
    attach(again, Adapter.load(tmp_path / "a"))
    torch.testing.assert_close(logits(again, "default"), tuned)


def written(tiny_llama_folder: Path, folder: Path) -> Path:
    base = base_of(tiny_llama_folder)
    config = LoraConfig(r=2, target_modules=("q_proj", "v_proj"))
    attach(base, config)
    shake(base)
    return described(adapter_of(base, "default", config), base).save(folder)


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")


def change_config(folder: Path, **fields) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda f: change_tensors(
                f, lambda t: t | {f"{Q}.lora_A.weight": t[f"{Q}.lora_A.weight"] / 0}
            ),
            "NaN or inf",
        ),
        (
            lambda f: change_tensors(
                f, lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}
            ),
            "only A",
        ),
        (
            lambda f: change_tensors(f, lambda t: {k: v for k, v in t.items() if Q not in k}),
            "has no factors",
        ),
        (lambda f: change_tensors(f, lambda t: t | {"stray": torch.zeros(2)}), "no place"),
        (
            lambda f: change_tensors(
                f, lambda t: {k.replace("q_proj", "z_proj"): v for k, v in t.items()}
            ),
            "z_proj",
        ),
        (
            lambda f: change_tensors(f, lambda t: {k: v.to(torch.int8) for k, v in t.items()}),
            "floating point",
        ),
        (
            lambda f: change_tensors(f, lambda t: t | {f"{Q}.lora_A.weight": torch.zeros(2, 5)}),
            "maps 5 to 32",
        ),
        (lambda f: change_config(f, r=3), "rank 2, the config says 3"),
        (lambda f: change_config(f, lora_alpha=1e9), "typo"),
        (lambda f: change_config(f, r=-1), "r:"),
        (lambda f: change_config(f, use_dora=True), "use_dora"),
        (lambda f: change_config(f, peft_type="IA3"), "only LORA"),
        (lambda f: (f / "adapter_config.json").write_text("[" * 99999), "not readable"),
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter_config.json"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickle"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(b"\xff" * 64),
            "not a whole safetensors",
        ),
    ],
)
def test_a_damaged_adapter_is_refused_by_name(tiny_llama_folder, tmp_path, damage, says):
    folder = written(tiny_llama_folder, tmp_path / "a")
    damage(folder)
    base = base_of(tiny_llama_folder)
    before = logits(base, None)
    with pytest.raises(AdapterError, match=says):
        attach(base, Adapter.load(folder))
    assert attached(base) == []
    assert torch.equal(logits(base, None), before)


def test_the_wrong_base_is_refused_even_when_shapes_agree(tiny_llama_folder, tmp_path):
    from tests.conftest import build_model_folder

    folder = written(tiny_llama_folder, tmp_path / "a")
    other = base_of(build_model_folder("llama", tmp_path / "m", seed=1))
    with pytest.raises(AdapterError, match="was trained beside"):
        attach(other, Adapter.load(folder))


@pytest.mark.parametrize(
    "name",
    [
        "qwen2.5-0.5b-r8-qv",
        "gpt2-r8-cattn",
        "gpt2-r8-cattn-cproj-all",
        "open-calm-1b-r1-fusedqkv",
        "dialogpt-small-r4",
    ],
)
def test_real_adapters_have_the_published_update_norms(shared_data, name):
    golden = json.loads((shared_data / "adapters/GOLDEN_delta_norms.json").read_text())[name]
    adapter = Adapter.load(shared_data / "adapters" / name)
    norms = {module: float(adapter.delta(module).norm()) for module in adapter.factors}
    assert norms == pytest.approx(golden["delta_fro"], rel=1e-4)
    assert adapter.parameters == golden["params"]
