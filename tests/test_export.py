"""A base written in bitsandbytes' layout opens in transformers, and here, as it was held."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.errors import ConfigError, ModelError
from pennyweight.export import export_bitsandbytes
from pennyweight.lora import attach
from pennyweight.model import BaseModel, load_base
from tests.conftest import build_tokenizer

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

IDS = torch.randint(5, 280, (21,), generator=torch.Generator().manual_seed(1))


def base_of(folder: Path, quantization: str, double: bool = True) -> BaseModel:
    return load_base(
        BaseConfig(
            model=str(folder), quantization=quantization, double_quantization=double, device="cpu"
        )
    )


def logits(base: BaseModel) -> torch.Tensor:
    with torch.inference_mode(), base.route.over((0, len(IDS)), (None,)):
        return base.logits(base.hidden(IDS, torch.arange(len(IDS))))


def theirs_of(folder: Path, config: BitsAndBytesConfig | None = None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = {} if config is None else {"quantization_config": config}
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map="cpu", **asked
        ).eval()


def their_logits(model) -> torch.Tensor:
    """In float32: outside training, bitsandbytes' CPU kernel multiplies in bf16."""
    for layer in model.modules():
        layer.training = type(layer).__name__ == "Linear4bit"
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(IDS[None]).logits[0]


def quantized_by(kind: str, double: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


def widened(folder: Path, to: Path) -> Path:
    """A random model of the same family whose rows are whole blocks.

    Of other rows bitsandbytes 0.50 restores the wrong values on a CPU.
    """
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(to)
    build_tokenizer().save_pretrained(to)
    return to


@pytest.mark.parametrize(
    ("family", "kind", "double"),
    [
        ("llama", "nf4", True),
        ("qwen2", "nf4", False),
        ("phi3", "fp4", True),
        ("gpt2", "nf4", True),
    ],
)
def test_transformers_and_bitsandbytes_open_it_with_equal_logits(
    tiny_model_folder, tmp_path, family, kind, double
):
    folder = widened(tiny_model_folder(family), tmp_path / "plain")
    base = base_of(folder, kind, double)
    ours = logits(base)
    attach(base, LoraConfig(r=2))
    export_bitsandbytes(base, tmp_path / "out")
    found = their_logits(theirs_of(tmp_path / "out"))
    wanted = their_logits(theirs_of(folder, quantized_by(kind, double)))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(base_of(tmp_path / "out", kind, double)), ours)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_holds_what_transformers_itself_would_save(tiny_model_folder, tmp_path, family):
    folder = tiny_model_folder(family)
    model = theirs_of(folder, quantized_by("nf4", True))
    model.save_pretrained(tmp_path / "theirs")
    build_tokenizer().save_pretrained(tmp_path / "theirs")
    export_bitsandbytes(base_of(folder, "nf4"), tmp_path / "ours")
    ours = load_file(tmp_path / "ours/model.safetensors")
    theirs = load_file(tmp_path / "theirs/model.safetensors")
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        if ".quant_state." in key:
            mine, other = (json.loads(bytes(t.tolist())) for t in (ours[key], tensor))
            assert mine.pop("nested_offset") == pytest.approx(other.pop("nested_offset"), rel=1e-6)
            assert mine == other
        else:
            torch.testing.assert_close(ours[key], tensor, rtol=1e-6, atol=1e-7, msg=key)
    ours_config = json.loads((tmp_path / "ours/config.json").read_text())
    theirs_config = json.loads((tmp_path / "theirs/config.json").read_text())
    mine = ours_config["quantization_config"]
    assert mine.pop("llm_int8_skip_modules") == ["lm_head"]
    assert mine.items() <= theirs_config["quantization_config"].items()
    assert torch.equal(
        logits(base_of(tmp_path / "theirs", "nf4")), logits(base_of(tmp_path / "ours", "nf4"))
    )


def test_eight_bits_come_back(tiny_llama_folder, tmp_path):
    base = base_of(tiny_llama_folder, "int8")
    export_bitsandbytes(base, tmp_path / "out")
    assert torch.equal(logits(base_of(tmp_path / "out", "int8")), logits(base))


def test_a_prequantized_folder_is_written_again_to_the_byte(shared_data, tmp_path):
    source = shared_data / "models/stories260k-bnb-nf4-dq"
    export_bitsandbytes(base_of(source, "nf4"), tmp_path / "out")
    ours = load_file(tmp_path / "out/model.safetensors")
    theirs = load_file(source / "model.safetensors")
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        if ".quant_state." in key:
            assert json.loads(bytes(ours[key].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            torch.testing.assert_close(ours[key], tensor, rtol=1e-6, atol=0, msg=key)


def test_what_cannot_be_exported_is_refused(tiny_llama_folder, tmp_path):
    with pytest.raises(ModelError, match="held unquantized"):
        export_bitsandbytes(base_of(tiny_llama_folder, "none"), tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ConfigError, match="exists"):
        export_bitsandbytes(base_of(tiny_llama_folder, "nf4"), tmp_path / "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
