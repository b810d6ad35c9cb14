"""Merging: what is written, what of the update survives, what is refused, and that nothing is left behind."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.errors import AdapterError, ConfigError, DiskError, ModelError
from pennyweight.export import export_bitsandbytes
from pennyweight.lora import Adapter, adapter_of, attach, trained_parameters
from pennyweight.merge import merge
from pennyweight.model import BaseModel, load_base, weight_files
from tests.conftest import build_model_folder

IDS = torch.randint(5, 280, (19,), generator=torch.Generator().manual_seed(1))
Q = "model.layers.0.self_attn.q_proj"


def base_of(folder: Path, quantization: str = "none") -> BaseModel:
    return load_base(BaseConfig(model=str(folder), quantization=quantization, device="cpu"))


def logits(base: BaseModel, name: str | None = "default", ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode(), base.route.over((0, len(ids)), (name,)):
        return base.logits(base.hidden(ids, torch.arange(len(ids))))


def opened(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The logits of transformers, which must find every weight it wants."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.inference_mode():
        return model.eval()(ids[None]).logits[0]


def tuned(base: BaseModel, config: LoraConfig | None = None, *, size: float = 0.1) -> Adapter:
    config = config or LoraConfig(r=4)
    attach(base, config)
    with torch.no_grad():
        for parameter in trained_parameters(base, "default").values():
            parameter.add_(torch.randn(parameter.shape) * size)
    return adapter_of(base, "default", config)


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def rewritten(folder: Path, to: Path, **save: Any) -> Path:
    """The same model saved again by transformers, in another type or in many files."""
    dtype = save.pop("dtype", torch.float32)
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(to, **save)
    return to


def test_only_what_the_adapter_changes_differs(tiny_llama_folder, tmp_path):
    base = base_of(tiny_llama_folder)
    adapter = tuned(base, LoraConfig(r=4, target_modules=("q_proj",)))
    merge(base, adapter, tmp_path / "m")
    before = load_file(tiny_llama_folder / "model.safetensors")
    after = load_file(tmp_path / "m/model.safetensors")
    assert set(before) == set(after)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{path}.weight" for path in adapter.factors}
    for path in adapter.factors:
        torch.testing.assert_close(
            after[f"{path}.weight"], before[f"{path}.weight"] + adapter.delta(path).detach()
        )
    assert settings(tmp_path / "m") == settings(tiny_llama_folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "m" / name).read_bytes() == (tiny_llama_folder / name).read_bytes()


def test_as_trained_and_original_differ_by_the_quantization_alone(tiny_llama_folder, tmp_path):
    base = base_of(tiny_llama_folder, "nf4")
    adapter = tuned(base)
    rows = [IDS.tolist(), IDS.flip(0).tolist()]
    trained = merge(base, adapter, tmp_path / "t", rows=rows)
    original = merge(base, adapter, tmp_path / "o", onto="original", rows=rows)
    assert trained.agreement is not None
    assert original.agreement is not None
    assert trained.agreement.tokens == 2 * (len(IDS) - 1)
    assert trained.agreement.max_logit_difference < 1e-4
    assert abs(trained.agreement.mean_kl) < 1e-6
    assert trained.agreement.top1_agreement == 1
    assert original.agreement.max_logit_difference > 0.1
    assert original.agreement.mean_kl > 1e-4
    plain = base_of(tiny_llama_folder)
    attach(plain, Adapter(adapter.config, adapter.factors))
    torch.testing.assert_close(opened(tmp_path / "o"), logits(plain), rtol=1e-4, atol=1e-4)


def test_a_prequantized_folder_becomes_a_plain_one(shared_data, tmp_path):
    ids = torch.arange(1, 60)
    for quantization in ("nf4", "none"):
        base = base_of(shared_data / "models/stories260k-bnb-nf4-dq", quantization)
        adapter = tuned(base, size=0.02)
        report = merge(base, adapter, tmp_path / quantization, rows=[ids.tolist()])
        assert report.agreement is not None
        assert report.agreement.max_logit_difference < 1e-3
        assert "quantization_config" not in settings(tmp_path / quantization)
        assert {
            t.dtype for t in load_file(tmp_path / quantization / "model.safetensors").values()
        } == {torch.float32}
        torch.testing.assert_close(
            opened(tmp_path / quantization, ids), logits(base, ids=ids), rtol=1e-4, atol=1e-3
        )
        with pytest.raises(ModelError, match="no original"):
            merge(base, adapter, tmp_path / "o", onto="original")


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_prequantized_with_other_layouts_and_biases(tiny_model_folder, tmp_path, family):
    folder = export_bitsandbytes(base_of(tiny_model_folder(family), "nf4"), tmp_path / "q")
    for quantization in ("nf4", "none"):
        base = base_of(folder, quantization)
        merge(base, tuned(base), tmp_path / quantization)
        torch.testing.assert_close(
            opened(tmp_path / quantization), logits(base), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_many_files_stay_many(tiny_model_folder, tmp_path, family):
    folder = rewritten(tiny_model_folder(family), tmp_path / "shards", max_shard_size="40KB")
    assert len(weight_files(folder)) > 2
    base = base_of(folder, "nf4")
    merge(base, tuned(base), tmp_path / "m")
    assert [p.name for p in weight_files(tmp_path / "m")] == [p.name for p in weight_files(folder)]
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for p in weight_files(tmp_path / "m") for t in load_file(p).values()
    )
    torch.testing.assert_close(opened(tmp_path / "m"), logits(base), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "untied"),
    [
        ({"modules_to_save": ("embed_tokens",)}, False),
        ({"target_modules": ("lm_head",)}, True),
        ({"target_modules": ("lm_head", "q_proj")}, True),
    ],
)
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_tied_weights_stay_tied_while_they_are_one(
    tiny_model_folder, tmp_path, family, fields, untied
):
    names = {"embed_tokens": "wte", "q_proj": "c_attn"} if family == "gpt2" else {}
    fields = {key: tuple(names.get(v, v) for v in value) for key, value in fields.items()}
    base = base_of(tiny_model_folder(family))
    report = merge(base, tuned(base, LoraConfig(r=4, **fields)), tmp_path / "m")
    assert report.untied == untied
    assert settings(tmp_path / "m").get("tie_word_embeddings", True) == (not untied)
    assert ("lm_head.weight" in load_file(tmp_path / "m/model.safetensors")) == untied
    torch.testing.assert_close(opened(tmp_path / "m"), logits(base), rtol=1e-4, atol=1e-4)


def test_bf16_keeps_most_of_a_real_update_and_says_how_much(tiny_llama_folder, tmp_path):
    base = base_of(tiny_llama_folder)
    adapter = tuned(base)
    report = merge(base, adapter, tmp_path / "m", dtype=torch.bfloat16, rows=[IDS.tolist()])
    assert report.dtype == "bfloat16"
    assert report.update_kept == pytest.approx(1, abs=0.02)
    assert report.update_kept != 1
    assert report.agreement is not None
    assert 1e-4 < report.agreement.max_logit_difference < 1
    assert settings(tmp_path / "m")["dtype"] == "bfloat16"
    assert "torch_dtype" not in settings(tmp_path / "m")
    dtypes = {t.dtype for t in load_file(tmp_path / "m/model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


def test_an_update_that_rounding_loses_is_refused(tiny_llama_folder, tmp_path):
    folder = rewritten(tiny_llama_folder, tmp_path / "half", dtype=torch.bfloat16)
    base = base_of(folder)
    adapter = tuned(base)
    small = {path: (a, b.detach() * 1e-5) for path, (a, b) in adapter.factors.items()}
    adapter = Adapter(adapter.config, small)
    with pytest.raises(AdapterError, match="survives rounding"):
        merge(base, adapter, tmp_path / "m")
    report = merge(base, adapter, tmp_path / "m", dtype=torch.float32)
    assert report.update_kept == pytest.approx(1, abs=0.05)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "m"]


def test_an_adapter_that_changes_nothing_is_refused(tiny_llama_folder, tmp_path):
    for config in (LoraConfig(r=4), LoraConfig(r=2, modules_to_save=("norm",))):
        base = base_of(tiny_llama_folder)
        attach(base, config)
        with pytest.raises(AdapterError, match="change nothing"):
            merge(base, adapter_of(base, "default", config), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_is_refused(tiny_model_folder, tmp_path):
    adapter = tuned(base_of(tiny_model_folder("llama")))
    other = base_of(build_model_folder("llama", tmp_path / "other", seed=1))
    with pytest.raises(AdapterError, match="was trained beside"):
        merge(other, adapter, tmp_path / "m")


def test_a_folder_that_holds_something_is_left_alone(tiny_llama_folder, tmp_path):
    base = base_of(tiny_llama_folder)
    adapter = tuned(base)
    (tmp_path / "m").mkdir()
    (tmp_path / "m/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not an empty folder"):
        merge(base, adapter, tmp_path / "m")
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    merge(base, adapter, tmp_path / "empty")
    assert (tmp_path / "empty/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("fault", "becomes"),
    [(OSError(28, "No space left on device"), DiskError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_a_failure_leaves_no_litter(tiny_llama_folder, tmp_path, monkeypatch, fault, becomes):
    base = base_of(tiny_llama_folder)
    adapter = tuned(base)

    def fails(*_: object) -> None:
        raise fault

    monkeypatch.setattr(import_module("pennyweight.merge.folder"), "copy_companions", fails)
    with pytest.raises(becomes):
        merge(base, adapter, tmp_path / "deep" / "m")
    assert not list((tmp_path / "deep").iterdir())


def test_old_files_without_the_models_prefix_and_with_buffers(tiny_model_folder, tmp_path):
    """The first GPT-2 files name `h.0...`, and carry the causal mask as a buffer."""
    folder = Path(shutil.copytree(tiny_model_folder("gpt2"), tmp_path / "old"))
    tensors = load_file(folder / "model.safetensors")
    old = {key.removeprefix("transformer."): t for key, t in tensors.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    base = base_of(folder)
    adapter = tuned(base)
    merge(base, adapter, tmp_path / "m", dtype=torch.float16)
    assert load_file(tmp_path / "m/model.safetensors")["h.0.attn.bias"].dtype == torch.uint8
    again = base_of(tmp_path / "m")
    torch.testing.assert_close(logits(again, None), logits(base), rtol=0.05, atol=0.05)
