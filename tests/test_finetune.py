"""One run from description to adapter: what it leaves behind, and that stopping it changes nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pennyweight.config import RunConfig
from pennyweight.errors import ConfigError, DataError, Interrupted
from pennyweight.finetune import finetune, look
from pennyweight.lora import Adapter
from pennyweight.report import Report, metrics_of, read_events


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]
    turns = [(f"say {a} {b}", f"{b} {a}") for a in words for b in words]
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in turns
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def description(tiny_llama_folder, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))

    def make(name: str = "run", **train: object) -> RunConfig:
        method = train.setdefault("method", "qlora")
        return RunConfig.model_validate(
            {
                "base": {
                    "model": str(tiny_llama_folder),
                    "quantization": "nf4" if method == "qlora" else "none",
                    "device": "cpu",
                },
                **({} if method == "full" else {"adapter": {"r": 4, "lora_dropout": 0.1}}),
                "data": {"train": str(rows), "eval_fraction": 0.2, "max_length": 64},
                "train": {
                    "learning_rate": 1e-2,
                    "max_steps": 6,
                    "batch_size": 4,
                    "eval_steps": 3,
                    **train,
                },
                "evaluate": {"generate_rows": 3, "max_new_tokens": 8},
                "output_dir": str(tmp_path / name),
            }
        )

    return make


def log(folder: str) -> list[dict]:
    return metrics_of(read_events(Path(folder) / "events.jsonl"))


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_run_learns_and_leaves_everything_behind(description, method):
    result = finetune(description(method=method))
    folder = Path(result.output_dir)
    assert result.loss_after < result.loss_before
    assert result.steps == 6
    for name in ("config.json", "events.jsonl", "ledger.jsonl", "receipt.json", "held_out"):
        assert (folder / name).exists()
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["result"]["loss_after"] == pytest.approx(result.loss_after)
    assert receipt["plan"]["peak_bytes"] == result.planned_peak_bytes
    if method == "full":
        assert (folder / "model" / "model.safetensors").is_file()
    else:
        assert Adapter.load(folder / "adapter").parameters == result.trained_parameters


@pytest.mark.parametrize("packing", [True, False])
def test_a_signal_saves_and_the_same_command_ends_with_the_same_bits(
    description, monkeypatch, packing
):
    config = description("whole", gradient_accumulation_steps=2)
    config = config.model_copy(update={"data": config.data.model_copy(update={"packing": packing})})
    finetune(config)
    stopped = config.model_copy(update={"output_dir": config.output_dir + "-stopped"})
    told = Report.step

    def tell_and_stop(self, step, **options):
        told(self, step, **options)
        if step.number in (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Report, "step", tell_and_stop)
    for _ in range(2):
        with pytest.raises(Interrupted, match="the same command resumes"):
            finetune(stopped)
    result = finetune(stopped)
    assert result.resumed_from == 4
    whole, again = (
        load_file(Path(c.output_dir) / "adapter" / "adapter_model.safetensors")
        for c in (config, stopped)
    )
    assert all((whole[k] == again[k]).all() for k in whole)
    assert log(config.output_dir) == log(stopped.output_dir)


def test_a_finished_run_is_not_trained_again(description):
    first = finetune(description())
    before = log(first.output_dir)
    again = finetune(description())
    assert again.resumed_from == 6
    assert again.loss_after == first.loss_after
    assert log(first.output_dir) == before


def test_a_changed_run_is_refused_with_the_difference(description, rows):
    finetune(description())
    with pytest.raises(ConfigError, match=r"train\.learning_rate: the checkpoint was made with"):
        finetune(description(learning_rate=2e-2))
    rows.write_text(rows.read_text() + rows.read_text().replace("say", "tell"))
    with pytest.raises(ConfigError, match="data: the checkpoint"):
        finetune(description())


def test_the_best_weights_are_kept_and_a_run_that_only_gets_worse_stops(description):
    result = finetune(
        description(
            learning_rate=0.5,
            max_grad_norm=None,
            lr_scheduler_type="constant",
            max_steps=12,
            eval_steps=1,
            early_stopping_patience=2,
        )
    )
    losses = {e["number"]: e["loss"] for e in log(result.output_dir) if e["kind"] == "evaluation"}
    del losses[0]
    assert result.best_step == min(losses, key=losses.get)
    assert result.loss_after == pytest.approx(losses[result.best_step], rel=1e-6)
    assert result.steps == result.best_step + 2 or result.steps == 12


def test_data_that_trains_nothing_is_refused(description, rows):
    rows.write_text('{"messages": [{"role": "user", "content": "alone"}]}\n')
    with pytest.raises(DataError):
        finetune(description())


def test_looking_reads_no_weight(description, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("pennyweight.finetune.load_base", never)
    seen = look(description(), rows=2)
    assert [any(s.trained for s in row.segments) for row in seen.shown] == [True, True]
    assert seen.summary["rows"] + sum("held out" in line for line in seen.lines) > 0
