"""A base read here gives transformers' own numbers, quantized or not, and refuses what it cannot trust."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pennyweight.config import BaseConfig
from pennyweight.errors import ModelError
from pennyweight.model import BaseModel, fingerprint, load_base
from pennyweight.model.resident import _hidden_of, check_head
from pennyweight.quant import QuantizedLinear, dequantize_4bit, quantize_4bit
from tests.conftest import FAMILIES

IDS = torch.randint(0, 280, (24,), generator=torch.Generator().manual_seed(1))


def logits(base: BaseModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode(), base.route.over((0, len(ids)), (None,)):
        return base.logits(base.hidden(ids, torch.arange(len(ids))))


def theirs(folder: Path, change: Callable[[torch.nn.Module], None] | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    if change is not None:
        change(model)
    with torch.inference_mode():
        return model(IDS[None]).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_transformers_own(tiny_model_folder, family):
    folder = tiny_model_folder(family)
    ours = logits(load_base(BaseConfig(model=str(folder), quantization="none", device="cpu")))
    torch.testing.assert_close(ours, theirs(folder), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_logits_are_those_of_the_dequantized_weights(tiny_model_folder, family):
    folder = tiny_model_folder(family)

    def requantize(model: torch.nn.Module) -> None:
        head = model.get_output_embeddings()
        for layer in model.modules():
            kind = type(layer).__name__
            if layer is not head and (isinstance(layer, torch.nn.Linear) or kind == "Conv1D"):
                dense = layer.weight.data.T if kind == "Conv1D" else layer.weight.data
                rounded = dequantize_4bit(quantize_4bit(dense.contiguous()))
                layer.weight.data = rounded.T.contiguous() if kind == "Conv1D" else rounded

    ours = logits(load_base(BaseConfig(model=str(folder), quantization="nf4", device="cpu")))
    torch.testing.assert_close(ours, theirs(folder, requantize), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_checked_in_one_pass_where_it_is_asked_alike(tiny_model_folder, family):
    base = load_base(BaseConfig(model=str(tiny_model_folder(family)), device="cpu"))
    passes = []
    base.module.base_model.register_forward_hook(
        lambda _, arguments, words, out: passes.append(words), with_kwargs=True
    )
    check_head(base)
    asked = {name for name, value in passes[0].items() if value is not None}
    alike = asked == {"input_ids", "position_ids", "use_cache"}  # not by GPT-2, nor older StableLMs
    assert len(passes) == (1 if alike else 2)
    assert alike or family in ("gpt2", "stablelm", "stablelm_12b")


@pytest.mark.parametrize("more", [{"inputs_embeds": 1}, {"use_cache": True}, {"scale": 2}])
def test_a_pass_that_was_asked_for_more_proves_nothing(more):
    ids, positions = torch.arange(4)[None], torch.arange(4)[None]
    given = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    out = SimpleNamespace(last_hidden_state=torch.zeros(1, 4, 2))
    seen = {**given, "attention_mask": None}
    assert _hidden_of([((), seen, out)], given) is not None
    assert _hidden_of([((), seen | more, out)], given) is None
    assert _hidden_of([((), seen | {"input_ids": ids.clone()}, out)], given) is None
    assert _hidden_of([((), seen, out)] * 2, given) is None
    assert _hidden_of([((ids,), seen, out)], given) is None


def test_every_linear_layer_but_the_head_is_held_quantized(tiny_llama_folder):
    base = load_base(BaseConfig(model=str(tiny_llama_folder), device="cpu"))
    held = [n for n, m in base.module.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(held) == 2 * 7
    assert isinstance(base.module.lm_head, torch.nn.Linear)
    assert not any(p.requires_grad for p in base.module.parameters())


def test_dense_weights_that_are_kept_change_no_logit(tiny_llama_folder):
    base = load_base(BaseConfig(model=str(tiny_llama_folder), quantization="nf4", device="cpu"))
    expected = logits(base)
    layers = [m for m in base.module.modules() if isinstance(m, QuantizedLinear)]
    numbers = sum(layer.in_features * layer.out_features for layer in layers)
    assert base.keep_dense() == 4 * numbers
    torch.testing.assert_close(logits(base), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("folder", "quantization", "double", "loss"),
    [
        ("stories260k", "none", True, 1.33665),
        ("stories260k", "nf4", False, 1.43900),
        ("stories260k", "nf4", True, 1.43829),
        ("stories260k-bnb-nf4", "nf4", False, 1.43900),
        ("stories260k-bnb-nf4-dq", "nf4", True, 1.43829),
        ("stories260k-bnb-nf4-dq", "none", True, 1.43829),
    ],
)
def test_published_losses_come_out(shared_data, folder, quantization, double, loss):
    base = load_base(
        BaseConfig(
            model=str(shared_data / "models" / folder),
            quantization=quantization,
            double_quantization=double,
            device="cpu",
        )
    )
    documents = json.loads((shared_data / "text/tinystories/tinystories_1000.json").read_text())[
        :20
    ]
    total, count = 0.0, 0
    for text in documents:
        ids = torch.tensor(
            ([1] + base.tokenizer(text, add_special_tokens=False)["input_ids"])[:400]
        )
        total += float(
            torch.nn.functional.cross_entropy(logits(base, ids)[:-1], ids[1:], reduction="sum")
        )
        count += len(ids) - 1
    assert total / count == pytest.approx(loss, abs=6e-6)


@pytest.mark.parametrize(
    ("name", "documents"),
    [("cs336_v2_sample_loss", 5), ("v1_clean_loss", 300), ("v1_mojibake_loss", 40)],
)
def test_golden_losses_come_out(shared_data, name, documents):
    """Of GOLDEN.json's texts those that stand beside it: BOS, the story, BOS; at most 512 tokens."""
    stories = shared_data / "text" / "tinystories"
    if name == "cs336_v2_sample_loss":
        texts = (stories / "v2_sample_5docs.txt").read_text().split("<|endoftext|>")
        texts = [text for text in texts if text.strip()]
    else:
        every = json.loads((stories / "tinystories_1000.json").read_text())
        garbled = [any(sign in text for sign in "âÃ") for text in every]
        texts = [t for t, bad in zip(every, garbled, strict=True) if bad == ("mojibake" in name)]
    folder = shared_data / "models" / "stories260k"
    base = load_base(BaseConfig(model=str(folder), quantization="none", device="cpu"))
    golden = json.loads((folder / "GOLDEN.json").read_text())["measured"][name]
    total, count = 0.0, 0
    for text in texts[:documents]:
        words = base.tokenizer(text.strip(), add_special_tokens=False)["input_ids"]
        ids = torch.tensor([1, *words, 1][:512])
        total += float(
            torch.nn.functional.cross_entropy(logits(base, ids)[:-1], ids[1:], reduction="sum")
        )
        count += len(ids) - 1
    assert total / count == pytest.approx(golden, abs=6e-5)


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_a_config_that_asks_to_run_code_is_refused(tiny_llama_folder, tmp_path):
    folder = copy_of(tiny_llama_folder, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"auto_map": {"AutoConfig": "evil.Config"}})
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="auto_map"):
        load_base(BaseConfig(model=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "no .safetensors weights"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"\x08" + b"\0" * 40),
            "not a whole safetensors file",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "../../etc/x"}}'
            ),
            "outside its folder",
        ),
    ],
)
def test_a_broken_folder_is_named(tiny_llama_folder, tmp_path, damage, says):
    folder = copy_of(tiny_llama_folder, tmp_path / "m")
    damage(folder)
    with pytest.raises(ModelError, match=says):
        load_base(BaseConfig(model=str(folder)))


def test_missing_misshapen_and_infinite_weights_are_refused(tiny_llama_folder, tmp_path):
    folder = copy_of(tiny_llama_folder, tmp_path / "m")
    # Copies: the file that older safetensors keep mapped is written over below.
    good = {name: each.clone() for name, each in load_file(folder / "model.safetensors").items()}
    key = "model.layers.0.self_attn.q_proj.weight"

    def with_weights(tensors: dict[str, torch.Tensor]) -> BaseConfig:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return BaseConfig(model=str(folder))

    with pytest.raises(ModelError, match=r"norm\.weight is missing"):
        load_base(with_weights({k: v for k, v in good.items() if k != "model.norm.weight"}))
    with pytest.raises(ModelError, match="q_proj"):
        load_base(with_weights({k: v for k, v in good.items() if k != key}))
    with pytest.raises(ModelError, match="norm"):
        load_base(with_weights(good | {"model.norm.weight": torch.ones(5)}))
    with pytest.raises(ModelError, match="q_proj"):
        load_base(with_weights(good | {key: torch.ones(5, 32)}))
    with pytest.raises(ModelError, match="q_proj"):
        load_base(with_weights(good | {key: good[key] * float("nan")}))


def test_fingerprints_tell_bases_of_one_shape_apart(tiny_llama_folder, tmp_path):
    folder = copy_of(tiny_llama_folder, tmp_path / "m")
    assert fingerprint(folder) == fingerprint(tiny_llama_folder)
    tensors = {name: each.clone() for name, each in load_file(folder / "model.safetensors").items()}
    tensors["model.norm.weight"] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != fingerprint(tiny_llama_folder)


def test_an_unknown_name_says_what_was_tried():
    with pytest.raises(ModelError, match="no such folder"):
        load_base(BaseConfig(model="./nowhere"))
    with pytest.raises(ModelError, match=r"sees no such device|not a device"):
        load_base(BaseConfig(device="cuda:99"))
