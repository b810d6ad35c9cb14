"""Law 9: adapters travel between here and PEFT with equal logits; a merged folder opens in transformers.

The tolerance is that of law 3, 2e-5 of the largest logit: the same products in float32, added in
another order. Factors are drawn far from zero, so that a wrong scale or place is beyond 1e-2.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tests.conftest import build_model_folder, build_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from pennyweight.config import BaseConfig, LoraConfig
from pennyweight.errors import AdapterError
from pennyweight.lora import Adapter, adapter_of, attach, described, trained_parameters
from pennyweight.merge import merge
from pennyweight.model import BaseModel, load_base

peft = pytest.importorskip("peft")

TOLERANCE = 2e-5
IDS = torch.randint(5, 280, (21,), generator=torch.Generator().manual_seed(1))

# What is asked of an adapter, in the words of both: family, our config.
MADE_HERE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "fused projections": ("phi3", {}),
    "conv1d": ("gpt2", {}),
    "conv1d in attention and mlp": ("gpt2", {"target_modules": ("c_proj",)}),
    "gemma3": ("gemma3", {"target_modules": "attention"}),
    "stablelm": ("stablelm_12b", {"target_modules": "mlp"}),
    "rank-stabilized": ("qwen3", {"use_rslora": True, "lora_alpha": 4}),
    "pattern": ("llama", {"target_modules": r".*\.1\..*(q_proj|up_proj)"}),
    "overlapping patterns": (
        "llama",
        {
            "rank_pattern": {r"layers\.1\..*": 3, "q_proj": 6, "down_proj": 1},
            "alpha_pattern": {"q_proj": 5.0, r".*0\.self_attn\..*": 2.5, "mlp.up_proj": 3.0},
            "use_rslora": True,
        },
    ),
    "part of a layer": (
        "gpt2",
        {"target_modules": ("transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_proj")},
    ),
    "head": ("llama", {"target_modules": ("lm_head", "q_proj")}),
    "tied head and embedding": ("qwen2", {"modules_to_save": ("embed_tokens",)}),
    "head and embedding": ("llama", {"modules_to_save": ("embed_tokens", "lm_head")}),
    "norm": ("mistral", {"modules_to_save": ("norm",)}),
    "norm with a bias": ("gpt2", {"modules_to_save": ("ln_f",)}),
}

# The same asked of PEFT.
MADE_THERE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "every layer": ("mistral", {"target_modules": "all-linear"}),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "names in attention and mlp": ("gpt2", {"target_modules": ["c_proj"], "fan_in_fan_out": True}),
    "gemma3": ("gemma3", {"target_modules": ["q_proj", "o_proj", "down_proj"]}),
    "regular expression": ("qwen3", {"target_modules": r".*\.(self_attn\.k_proj|mlp\.\w+_proj)"}),
    "full names": (
        "llama",
        {"target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]},
    ),
    "rank-stabilized": ("llama", {"target_modules": ["k_proj"], "use_rslora": True}),
    "overlapping patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 3, "q_proj": 6, r"x.*|down_proj": 1},
            "alpha_pattern": {r"^model\.layers\.1\..*": 5, "k_proj": 2},
        },
    ),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "layers by name": (
        "gpt2",
        {
            "target_modules": ["c_attn"],
            "layers_to_transform": 0,
            "layers_pattern": "h",
            "fan_in_fan_out": True,
        },
    ),
    "excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    "excluded by pattern": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
    ),
    "tied, trained as one": (
        "qwen2",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "tied, embedding alone": (
        "qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "tied, head alone": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, each its own": (
        "qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "tied, factors on the head": ("qwen2", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding and head": (
        "llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
}


def base_of(folder: Path) -> BaseModel:
    return load_base(BaseConfig(model=str(folder), quantization="none", device="cpu"))


def theirs_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(base: BaseModel, name: str | None = "default") -> torch.Tensor:
    with torch.inference_mode(), base.route.over((0, len(IDS)), (name,)):
        return base.logits(base.hidden(IDS, torch.arange(len(IDS))))


def their_logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS[None]).logits[0]


def shake(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)


def assert_equal_logits(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


def quiet(call: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT warns of tied weights and idle settings; its warnings are not under test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args, **kwargs)


@pytest.mark.parametrize("case", MADE_HERE)
def test_an_adapter_made_here_loads_in_peft_and_its_merged_folder_in_transformers(
    tiny_model_folder, tmp_path, case
):
    family, fields = MADE_HERE[case]
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, **fields})
    base = base_of(tiny_model_folder(family))
    attach(base, config)
    bare = logits(base, None)
    shake(trained_parameters(base, "default"))
    wanted = logits(base)
    assert float((wanted - bare).abs().max()) > 0.01 * float(bare.abs().max())
    adapter = described(adapter_of(base, "default", config), base)
    adapter.save(tmp_path / "a")
    model = quiet(
        peft.PeftModel.from_pretrained, theirs_of(tiny_model_folder(family)), tmp_path / "a"
    )
    assert_equal_logits(their_logits(model), wanted)
    merge(base, adapter, tmp_path / "m")
    assert_equal_logits(their_logits(theirs_of(tmp_path / "m")), wanted)


@pytest.mark.parametrize("case", MADE_THERE)
def test_an_adapter_made_by_peft_loads_here_and_its_merged_folder_in_transformers(
    tiny_model_folder, tmp_path, case
):
    family, fields = MADE_THERE[case]
    folder = tiny_model_folder(family)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **fields})
    model = quiet(peft.get_peft_model, theirs_of(folder), config)
    shake({n: p for n, p in model.named_parameters() if p.requires_grad})
    wanted = their_logits(model.eval())
    quiet(model.save_pretrained, tmp_path / "a")
    base = base_of(folder)
    bare = logits(base, None)
    assert float((wanted - bare).abs().max()) > 0.01 * float(bare.abs().max())
    adapter = Adapter.load(tmp_path / "a")
    assert adapter.notes == ()
    attach(base, adapter)
    assert_equal_logits(logits(base), wanted)
    assert_equal_logits(logits(base, None), bare)
    merge(base, adapter, tmp_path / "m")
    assert_equal_logits(their_logits(theirs_of(tmp_path / "m")), wanted)
    described(adapter, base).save(tmp_path / "again")
    model = quiet(peft.PeftModel.from_pretrained, theirs_of(folder), tmp_path / "again")
    assert_equal_logits(their_logits(model), wanted)


# Real adapters and the shape of their bases; layers are left out, and MLPs that no factor stands beside.
REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2.5-0.5b-r8-qv": (
        "qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2-r8-cattn": ("gpt2", {"n_positions": 64, "n_layer": 2}),
    "gpt2-r8-cattn-cproj-all": ("gpt2", {"n_positions": 64, "n_layer": 2}),
    "dialogpt-small-r4": ("gpt2", {"n_positions": 64, "n_layer": 2}),
    "open-calm-1b-r1-fusedqkv": (
        "gpt_neox",
        {
            "hidden_size": 2048,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 16,
            "max_position_embeddings": 64,
        },
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_real_adapters_give_the_logits_they_give_in_peft(shared_data, tmp_path, name):
    kind, shape = REAL[name]
    config = AutoConfig.for_model(kind, vocab_size=304, bos_token_id=1, eos_token_id=2, **shape)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "m")
    build_tokenizer().save_pretrained(tmp_path / "m")
    folder = cut_to(shared_data / "adapters" / name, tmp_path / "a", config.num_hidden_layers)
    model = quiet(peft.PeftModel.from_pretrained, theirs_of(tmp_path / "m"), folder)
    wanted = their_logits(model)
    base = base_of(tmp_path / "m")
    adapter = Adapter.load(folder)
    attach(base, adapter)
    assert_equal_logits(logits(base), wanted)
    moved = float((wanted - logits(base, None)).abs().max())
    assert moved > 10 * TOLERANCE * float(wanted.abs().max())
    said = any("q_proj, v_proj" in note for note in adapter.notes)
    assert said == (name == "gpt2-r8-cattn")


def cut_to(adapter: Path, to: Path, layers: int) -> Path:
    """The adapter without the factors of layers that the base leaves out."""
    shutil.copytree(adapter, to)
    tensors = load_file(to / "adapter_model.safetensors")
    kept = {k: t for k, t in tensors.items() if int(re.search(r"\.(\d+)\.", k)[1]) < layers}
    save_file(kept, to / "adapter_model.safetensors", metadata={"format": "pt"})
    return to


def test_what_the_file_carries_along_must_be_the_bases_own(tiny_model_folder, tmp_path):
    """PEFT writes the base's head along with factors on it; beside another head that is a fault."""
    folder = tiny_model_folder("llama")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = quiet(peft.get_peft_model, theirs_of(folder), config)
    quiet(model.save_pretrained, tmp_path / "a")
    adapter = Adapter.load(tmp_path / "a")
    assert set(adapter.along) == {"lm_head.weight"}
    attach(base_of(folder), adapter)
    other = base_of(build_model_folder("llama", tmp_path / "m", seed=1))
    with pytest.raises(AdapterError, match="carries it along"):
        attach(other, adapter)


def test_a_bias_that_peft_trained_is_refused_by_name(tiny_model_folder, tmp_path):
    """Of a module trained whole PEFT trains the bias too; here only the weight has a place."""
    folder = tiny_model_folder("gpt2")
    config = peft.LoraConfig(
        r=2, target_modules=["c_fc"], modules_to_save=["ln_f"], fan_in_fan_out=True
    )
    model = quiet(peft.get_peft_model, theirs_of(folder), config)
    quiet(model.save_pretrained, tmp_path / "same")
    attach(base_of(folder), Adapter.load(tmp_path / "same"))
    shake({n: p for n, p in model.named_parameters() if p.requires_grad})
    quiet(model.save_pretrained, tmp_path / "other")
    with pytest.raises(AdapterError, match=r"ln_f\.bias"):
        attach(base_of(folder), Adapter.load(tmp_path / "other"))


def test_the_card_is_valid_and_names_the_base(tiny_llama_folder, tmp_path):
    base = base_of(tiny_llama_folder)
    base.name = 'a "name": with\n--- tricks'
    attach(base, LoraConfig(r=2, modules_to_save=("norm",)))
    adapter = adapter_of(base, "default", LoraConfig(r=2))
    described(adapter, base, base_quantization="nf4").save(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == 'a "name": with --- tricks'
    assert card.data.library_name == "peft"
    assert card.data.tags == ["lora", "pennyweight"]
    for fact in ("Rank 2", "model.norm", "nf4", base.fingerprint):
        assert fact in card.text
