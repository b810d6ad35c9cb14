"""A run's folder alone is enough: data and description may be gone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pennyweight.errors import AdapterError, ConfigError, DiskError
from pennyweight.finetune import finetune
from pennyweight.runs import RunFolder, evaluate_run, merge_folder, merge_run, open_chat
from tests.test_finetune import description, rows  # noqa: F401 - fixtures


@pytest.fixture
def finished(description, rows, monkeypatch, tmp_path):  # noqa: F811
    def make(method: str = "qlora") -> Path:
        result = finetune(description(method=method))
        rows.unlink()
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        monkeypatch.chdir(elsewhere)
        monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "another-cache"))
        return Path(result.output_dir)

    return make


@pytest.mark.parametrize("method", ["qlora", "full"])
def test_evaluate(finished, method):
    measured = evaluate_run(finished(method))
    assert measured["tuned"]["loss"] < measured["base"]["loss"]
    assert measured["tuned"]["answers"] == 3
    assert measured["loss_difference"]["difference"] == pytest.approx(
        measured["tuned"]["loss"] - measured["base"]["loss"]
    )


def test_chat_streams_and_remembers(finished):
    folder = finished()
    session = open_chat(folder)
    session.max_new_tokens = 6
    said = "".join(session.send("say red"))
    assert [m["role"] for m in session.messages] == ["user", "assistant"]
    assert session.messages[1]["content"] == said
    base = open_chat(folder, None)
    base.max_new_tokens = 6
    assert isinstance("".join(base.send("say red")), str)
    with pytest.raises(ConfigError, match="one, named default"):
        open_chat(folder, "other")


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_merge_is_measured_written_down_and_opens_in_transformers(finished, tmp_path, method):
    said: list[str] = []
    report = merge_run(finished(method), tmp_path / "merged", dtype="float32", say=said.append)
    assert report.onto == "as-trained"
    assert report.agreement.max_logit_difference < 1e-4
    assert report.measured_on == "held-out rows of the run"
    tried = ["as-trained", "original"] if method == "qlora" else ["as-trained"]
    assert [model["name"] for model in report.models] == ["adapter", *tried, "base"]
    assert len(said) == 1 + len(tried)
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    written = json.loads((tmp_path / "merged/merge.json").read_text())
    assert written["schema_version"] == 1
    assert written["models"][1]["mean_kl"] == report.agreement.mean_kl
    assert written["models"][0]["loss"] < written["models"][-1]["loss"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("merged")) == ["merged"]


def test_merge_measures_on_other_rows_or_on_its_own_words(finished, tmp_path):
    folder = finished()
    row = {
        "messages": [
            {"role": "user", "content": "say red"},
            {"role": "assistant", "content": "red red"},
        ]
    }
    (tmp_path / "more.jsonl").write_text((json.dumps(row) + "\n") * 5)
    report = merge_run(folder, tmp_path / "a", data=tmp_path / "more.jsonl", rows=3)
    assert (report.rows, report.measured_on) == (3, "rows of more.jsonl")
    report = merge_run(folder, tmp_path / "b", rows=2)
    assert report.rows == 2
    (folder / "config.json").rename(folder / "kept")
    with pytest.raises(ConfigError, match="not a run's folder"):
        merge_folder(folder, tmp_path / "c")
    # The adapter's folder alone: it says itself what it was trained beside.
    report = merge_folder(folder / "adapter", tmp_path / "c")
    assert report.measured_on == "texts that the adapter wrote itself"
    assert report.rows == 8
    assert report.agreement.tokens > 100
    assert [m["name"] for m in report.models] == ["adapter", "as-trained", "original", "base"]
    report = merge_folder(folder / "adapter", tmp_path / "d", quantization="none", base="original")
    assert [m["name"] for m in report.models] == ["adapter", "original", "base"]


def test_merge_asks_only_what_it_can_use(finished, tmp_path):
    folder = finished()
    with pytest.raises(ConfigError, match="a run knows its base"):
        merge_folder(folder, tmp_path / "m", model="builtin")
    with pytest.raises(ConfigError, match="int3"):
        merge_folder(folder / "adapter", tmp_path / "m", quantization="int3")
    with pytest.raises(ConfigError, match="--dtype int8: use float32"):
        merge_folder(folder, tmp_path / "m", dtype="int8")
    with pytest.raises(AdapterError, match="load the base it was trained beside"):
        merge_folder(folder / "adapter", tmp_path / "m", model="builtin")
    assert not (tmp_path / "m").exists()


def test_merge_refuses_a_taken_folder_before_it_reads_the_base(finished, tmp_path, monkeypatch):
    folder = finished()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")

    def read(*_, **__):
        raise AssertionError("the base was read first")

    monkeypatch.setattr(RunFolder, "open", read)
    monkeypatch.setattr("pennyweight.runs.merging.load_base", read)
    for what in (folder, folder / "adapter"):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            merge_folder(what, tmp_path / "taken")


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_peft_made_is_merged(tiny_llama_folder, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 * ("lora_" in name))
    model.save_pretrained(tmp_path / "adapter")
    report = merge_folder(tmp_path / "adapter", tmp_path / "merged")
    assert report.modules == 4
    ids = torch.arange(5, 30)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        torch.testing.assert_close(
            merged(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4
        )


def test_a_whole_tuned_model_is_not_merged(finished, tmp_path):
    with pytest.raises(ConfigError, match="tunes the whole model"):
        merge_run(finished("full"), tmp_path / "merged")


def test_what_is_no_run_is_said(tmp_path, finished):
    with pytest.raises(ConfigError, match="not a run's folder"):
        evaluate_run(tmp_path)
    folder = finished()
    (RunFolder(folder).held_out / "eval.ids.npy").write_bytes(b"")
    with pytest.raises(DiskError, match="held_out"):
        evaluate_run(folder)
