"""Receipts and model cards: whole, readable by the Hub's own parser, right when pasted, and not talkative."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from pennyweight.config import RunConfig
from pennyweight.finetune import finetune
from pennyweight.lora import Adapter
from pennyweight.model import license_of, load_tokenizer
from pennyweight.runs import RunFolder, merge_run
from pennyweight.runs.card import merged_card, run_card
from pennyweight.runs.receipt import SCHEMA_VERSION
from tests.test_finetune import description, rows  # noqa: F401 - fixtures


@pytest.fixture
def finished(description):  # noqa: F811
    return lambda method: RunFolder(Path(finetune(description(method=method)).output_dir))


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", card, re.S | re.M)


def pasted(code: str, **places: Path) -> str:
    """What the code prints once its places are filled in."""
    for name, folder in places.items():
        code = re.sub(rf"path/to/{name}", str(folder), code)
    assert "path/to" not in code
    code = code.replace("max_new_tokens=128", "max_new_tokens=12")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(compile(code, "README.md", "exec"), {})
    return said.getvalue()


@pytest.mark.filterwarnings("ignore")  # of PEFT and bitsandbytes
def test_an_adapters_card_is_right_when_pasted(finished, tiny_llama_folder):
    peft = pytest.importorskip("peft")
    run = finished("lora")
    card = ModelCard.load(run.adapter / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags[:2] == ["pennyweight", "lora"]
    assert card.data.base_model is None  # a folder here is nothing to the Hub
    receipt = run.receipt()
    for figure in (
        f"{receipt['held_out']['before']['loss']:.4g}",
        f"{receipt['held_out']['after']['loss']:.4g}",
        f"{receipt['held_out']['difference']['difference']:+.4g}",
        receipt["data"]["fingerprint"],
        "Rank 4, alpha 32",
        "| steps | 6 | 6 |",
    ):
        assert figure in card.text
    places = {"this/folder": run.adapter, tiny_llama_folder.name: tiny_llama_folder}
    ours, theirs = blocks(card.content, "python")
    said = pasted(ours, **places)
    assert said.strip()
    assert pasted(theirs, **places) == said
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    peft.PeftModel.from_pretrained(model, run.adapter)
    (yaml,) = blocks(card.content, "yaml")
    assert "method: lora" in yaml


@pytest.mark.filterwarnings("ignore")
def test_a_qlora_card_quantizes_the_base_as_training_did(tmp_path, monkeypatch):
    """With the built-in model: bitsandbytes has no CPU code for rows shorter than its blocks."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    settings: dict[str, Any] = {
        "base": {"model": "builtin", "device": "cpu"},
        "data": {"train": "builtin", "max_length": 256},
        "train": {"max_steps": 2, "tokens_per_step": 512},
        "evaluate": {"max_rows": 2, "generate_rows": 0},
        "output_dir": str(tmp_path / "run"),
    }
    run = RunFolder(Path(finetune(RunConfig.model_validate(settings)).output_dir))
    assert Adapter.load(run.adapter).about["base_double_quantization"] is True
    card = ModelCard.load(run.adapter / "README.md")
    assert (card.data.license, card.data.tags[-1]) == ("apache-2.0", "qlora")
    ours, theirs = blocks(card.content, "python")
    for part in ('"nf4"', "bnb_4bit_use_double_quant=True", "compute_dtype=torch.float32"):
        assert part in theirs
    for code in (ours, theirs):
        assert pasted(code, **{"this/folder": run.adapter}).strip()


def test_a_whole_models_card_and_a_merged_ones(finished, tmp_path):
    run = finished("full")
    card = ModelCard.load(run.model / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["pennyweight", "full"]
    assert (run.model / "receipt.json").is_file()
    (code,) = blocks(card.content, "python")
    whole = pasted(code, **{"this/folder": run.model})
    assert whole.strip()
    assert run.receipt()["held_out"]["difference"]["interval_95"]


def test_a_merged_folders_card_has_both(finished, tmp_path):
    run = finished("lora")
    report = merge_run(run.path, tmp_path / "merged", say=lambda line: None)
    card = ModelCard.load(tmp_path / "merged/README.md")
    assert card.data.library_name == "transformers"
    assert "as-trained (this one)" in card.text
    assert f"{report.models[0]['loss']:.4g}" in card.text
    assert "## What the adapter was worth" in card.text
    (code,) = blocks(card.content, "python")
    assert pasted(code, **{"this/folder": tmp_path / "merged"}).strip()
    assert json.loads((tmp_path / "merged/receipt.json").read_text()) == run.receipt()
    # Without a run there is less to say, and it is said.
    merged = json.loads((tmp_path / "merged/merge.json").read_text())
    alone = merged_card(merged, None)
    assert "## What the merge cost" in alone
    assert "## How it was trained" not in alone
    assert ModelCard(alone).data.library_name == "transformers"


def test_a_receipt_says_where_every_value_comes_from(finished):
    receipt = finished("full").receipt()
    told = receipt["configuration"]
    assert told["train.learning_rate"] == {"value": 0.01, "from": "Python"}
    assert told["base.quantization"] == {"value": "none", "from": "Python"}
    assert told["train.epochs"] == {"value": 1.0, "from": "default"}
    assert told["base.double_quantization"]["from"] == "follows from base.quantization"
    assert told["base.dtype"] == {"value": "auto", "from": "default", "became": "float32"}
    assert told["train.warmup_steps"]["became"] == 0
    assert told["train.save_steps"]["became"] == 3
    assert told["data.template"]["became"] == "tokenizer"
    assert receipt["schema_version"] == SCHEMA_VERSION
    assert set(receipt["versions"]) >= {"python", "torch", "transformers", "pennyweight"}
    assert receipt["machine"]["device"] == "cpu"
    assert receipt["adapter"] is None
    against = {each["what"]: each for each in receipt["plan_against_measured"]}
    assert against["steps"]["planned"] == against["steps"]["measured"] == 6
    assert against["peak memory"]["planned"] == receipt["plan"]["counted_peak_bytes"]
    assert against["peak memory"]["measured"] > 0
    assert against["tokens"]["measured"] > receipt["result"]["trained_tokens"]


def test_no_secret_and_no_path_is_published(description, rows, tmp_path, monkeypatch):  # noqa: F811
    token, key = "hf_" + "Zz9" * 11, "fedcba98" * 5
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("WANDB_API_KEY", key)
    private = tmp_path / "jane-doe" / token / key
    private.mkdir(parents=True)
    rows.rename(private / "rows.jsonl")
    config = description("jane-doe/run", method="lora")
    data = {"train": str(private / "rows.jsonl"), "system": "Say swordfish.", "max_length": 96}
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    run = RunFolder(Path(finetune(config, text=f"# {token}\n").output_dir))
    merge_run(run.path, tmp_path / "merged", say=lambda line: None)
    merge_run(run.path, tmp_path / "again", data=private / "rows.jsonl", say=lambda line: None)
    folders = (run.adapter, tmp_path / "merged", tmp_path / "again")
    published = [path for folder in folders for path in folder.glob("*.json")]
    published = [path for path in published if path.name in ("receipt.json", "merge.json")]
    published += [run.path / "receipt.json", *(folder / "README.md" for folder in folders)]
    assert len(published) == 9
    for path in published:
        text = path.read_text()
        for private_text in (token, key, "jane-doe", str(tmp_path), "swordfish", str(Path.home())):
            assert private_text not in text, (path, private_text)
    receipt = run.receipt()
    assert receipt["data"]["train"] == ["rows.jsonl"]
    assert "A system message opened every conversation" in (run.adapter / "README.md").read_text()


def test_a_finished_run_looked_at_again_keeps_its_peak_and_a_resumed_one_says_so(
    description,  # noqa: F811
    monkeypatch,
):
    from pennyweight.finetune import run as run_room

    peaks = iter([10**9, 10**9, 5, 5, 5])
    monkeypatch.setattr(run_room, "peak_memory_bytes", lambda device: next(peaks, 5))
    first = finetune(description(method="lora"))
    again = finetune(description(method="lora"))
    assert (first.peak_memory_bytes, again.peak_memory_bytes) == (10**9, 10**9)
    receipt = RunFolder(Path(again.output_dir)).receipt()
    assert receipt["resumed_after"] == []
    assert receipt["held_out"]["before"]["loss"] == first.loss_before


MADE: list[dict[str, Any]] = []


@pytest.fixture
def receipt(finished) -> dict[str, Any]:
    """One for all tests that only change it."""
    if not MADE:
        MADE.append(finished("lora").receipt())
    return copy.deepcopy(MADE[0])


def changed(receipt: dict[str, Any], **parts: dict[str, Any]) -> dict[str, Any]:
    return {**receipt, **{name: {**receipt[name], **part} for name, part in parts.items()}}


def test_what_the_hub_reads_of_a_card(receipt):
    base = {"hub_id": "Qwen/Qwen3-0.6B@main", "model": "Qwen/Qwen3-0.6B@main"}
    licence = {"license": "other", "license_name": "qwen", "license_link": "https://a.b/c"}
    data = {"hub_ids": ["acme/rows@v1", "acme/rows"], "train": ["acme/rows"]}
    told = ModelCard(run_card(changed(receipt, base={**base, **licence}, data=data))).data
    assert told.base_model == "Qwen/Qwen3-0.6B"
    assert told.to_dict()["base_model_relation"] == "adapter"
    assert told.datasets == ["acme/rows"]
    assert (told.license, told.license_name) == ("other", "qwen")
    assert ModelCard(run_card(receipt)).data.license is None


def test_names_do_not_break_out(receipt):
    name = 'x"\n---\n# <b>`rm`</b> | [a](b)'
    text = run_card(changed({**receipt, "name": name}, base={"model": name}))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    assert '`x" --- # <b>rm</b> | [a](b)`' in prose  # as code, on one line
    assert "<b>" not in re.sub(r"`[^`\n]*`", "", prose)
    assert ModelCard(text).data.library_name == "peft"
    for code in blocks(text, "python"):
        compile(code, "README.md", "exec")


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ({"r": 9}, "--max-lora-rank 16"),
        ({"r": 1000}, "does not take this adapter as it is"),
        ({"patterned": True}, "does not take this adapter as it is"),
        ({"trained_whole": ["norm"]}, "does not take this adapter as it is"),
        ({"target_modules": ["lm_head"]}, "does not take this adapter as it is"),
    ],
)
def test_what_vllm_takes(receipt, adapter, says):
    text = run_card(changed(receipt, adapter=adapter))
    assert says in text
    assert ("--enable-lora" in text) == ("--max-lora-rank" in says)
    quantized = run_card(changed(receipt, base={"quantization": "nf4"}, adapter={"r": 8}))
    assert "not what the adapter was trained beside (nf4)" in quantized


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_prompts_are_made_as_in_training(description, tiny_llama_folder, template):  # noqa: F811
    """The tokenizer's template is another one here: the card loads the one that stands in the folder."""
    pytest.importorskip("peft")
    config = description(method="lora", max_steps=1)
    data = {"template": template, "prompt_suffix": " =>" if template == "plain" else ""}
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    run = RunFolder(Path(finetune(config).output_dir))
    card = (run.adapter / "README.md").read_text()
    places = {"this/folder": run.adapter, tiny_llama_folder.name: tiny_llama_folder}
    ours, theirs = (code + "print(prompt)\n" for code in blocks(card, "python"))
    said = pasted(ours, **places)
    assert pasted(theirs, **places) == said
    renderer = run.renderer(load_tokenizer(str(tiny_llama_folder)))
    trained = renderer.prompt([{"role": "user", "content": "Your question"}])
    assert said.splitlines()[-1] == str(list(trained))


def test_a_run_without_held_out_rows_says_that_nothing_was_measured(receipt):
    text = run_card({**receipt, "held_out": None, "resumed_after": [3], "notices": ["a *note*"]})
    assert "No rows were held out" in text
    assert "Taken up again after step 3." in text
    assert r"- a \*note\*" in text


def test_licences_are_read_where_they_are_said(tmp_path):
    assert license_of(tmp_path) == {}
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model\n")
    assert license_of(tmp_path) == {"license": "apache-2.0"}
    card.write_text("---\nlicense: [a, b]\n---\n")
    assert license_of(tmp_path) == {}
    card.write_text("---\nlicense: {: ]\n---\n")
    assert license_of(tmp_path) == {}
    card.write_text("# no front matter\n")
    assert license_of(tmp_path) == {}


def test_a_receipt_of_another_schema_is_none(finished, tmp_path):
    run = finished("lora")
    run.path.joinpath("receipt.json").write_text('{"schema_version": 99}')
    assert run.receipt() is None
    run.path.joinpath("receipt.json").write_text("{")
    assert run.receipt() is None
    merge_run(run.path, tmp_path / "merged", say=lambda line: None)
    assert not (tmp_path / "merged/receipt.json").exists()
    # Of this schema, and yet not what a run wrote: the merge is not lost for it.
    run.path.joinpath("receipt.json").write_text(f'{{"schema_version": {SCHEMA_VERSION}}}')
    merge_run(run.path, tmp_path / "again", say=lambda line: None)
    assert not (tmp_path / "again/receipt.json").exists()
    assert "receipt could not be read" in (tmp_path / "again/README.md").read_text()
