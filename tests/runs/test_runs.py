"""A run's folder alone is enough: data and description may be gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pennyweight.errors import ConfigError, DiskError
from pennyweight.finetune import finetune
from pennyweight.runs import RunFolder, evaluate_run, merge_run, open_chat
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


def test_merge_is_measured_and_opens_in_transformers(finished, tmp_path):
    report = merge_run(finished(), tmp_path / "merged", dtype="float32")
    assert report.agreement is not None
    assert report.agreement.max_logit_difference < 1e-4
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


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
