"""One run from description to adapter: what it leaves behind, and that stopping it changes nothing."""

from __future__ import annotations

import datetime
import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pennyweight.config import RunConfig
from pennyweight.data import dataset
from pennyweight.errors import ConfigError, DataError, Interrupted
from pennyweight.finetune import finetune, look
from pennyweight.finetune import run as run_room
from pennyweight.lora import Adapter
from pennyweight.report import Report, metrics_of, read_events
from pennyweight.runs import RunFolder


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
    stop_after(monkeypatch, 2, 4)
    for _ in range(2):
        with pytest.raises(Interrupted, match="the same command resumes"):
            finetune(stopped)
    result = finetune(stopped)
    assert result.resumed_from == 4
    told, other = (
        json.loads((Path(c.output_dir) / "receipt.json").read_text()) for c in (stopped, config)
    )
    assert (told["resumed_after"], other["resumed_after"]) == ([2, 4], [])
    assert told["held_out"] == other["held_out"]
    assert told["plan_against_measured"][3] == other["plan_against_measured"][3]
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
    with pytest.raises(ConfigError, match=r"data, train .*rows\.jsonl: the checkpoint"):
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


def test_a_run_that_goes_on_after_midnight_prints_the_day_it_began(
    description, tmp_path, monkeypatch
):
    class Day(datetime.date):
        now = datetime.date(2026, 1, 31)

        @classmethod
        def today(cls):
            return cls.now

    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = description()
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"template": str(template)})}
    )
    monkeypatch.setattr("pennyweight.data.prepare.date", Day)
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        finetune(config)
    Day.now = datetime.date(2026, 2, 1)
    assert finetune(config).resumed_from == 2
    settings = RunFolder(Path(config.output_dir)).read_held_out().rendering
    assert settings["day"] == "2026-01-31"
    other = config.model_copy(update={"output_dir": str(tmp_path / "new")})
    finetune(other)
    assert RunFolder(tmp_path / "new").read_held_out().rendering["day"] == "2026-02-01"


def stop_after(monkeypatch, *steps):
    """SIGTERM once the line of each of these steps is printed, the first time it is."""
    told, left = Report.step, set(steps)

    def tell_and_stop(self, step, **options):
        told(self, step, **options)
        if step.number in left:
            left.remove(step.number)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Report, "step", tell_and_stop)


def test_an_evaluation_cut_short_is_made_when_the_run_resumes(description, monkeypatch):
    finetune(description("whole"))
    stopped = description("stopped")
    measure = run_room.loss_by_batch
    measured = []

    def stop_in_the_second(base, batches):
        measured.append(1)
        if len(measured) == 2:  # the first is that of the bare base
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(base, batches)

    monkeypatch.setattr(run_room, "loss_by_batch", stop_in_the_second)
    with pytest.raises(Interrupted, match="SIGTERM after step 3 of 6"):
        finetune(stopped)
    assert [e["number"] for e in log(stopped.output_dir) if e["kind"] == "evaluation"] == [0]
    assert finetune(stopped).resumed_from == 3
    assert log(stopped.output_dir) == log(description("whole").output_dir)


@pytest.mark.parametrize("room", ["load_base", "prepare", "plan"])
def test_a_signal_before_the_first_step_ends_at_once(description, monkeypatch, room):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    with monkeypatch.context() as patch:
        patch.setattr(f"pennyweight.finetune.{room}", stop)
        with pytest.raises(Interrupted, match="SIGINT: nothing was begun"):
            finetune(description())
    assert finetune(description()).resumed_from is None


def test_a_signal_while_the_result_is_written(description, monkeypatch):
    whole = finetune(description("whole"))
    stop_after(monkeypatch, 6)  # the last: what follows is its evaluation
    stopped = description("stopped")
    with pytest.raises(Interrupted):
        finetune(stopped)
    assert not (Path(stopped.output_dir) / "receipt.json").exists()
    result = finetune(stopped)
    assert (result.resumed_from, result.loss_after) == (6, whole.loss_after)
    assert log(stopped.output_dir) == log(whole.output_dir)


def test_a_best_checkpoint_that_is_damaged_is_said_and_the_last_weights_kept(
    description, monkeypatch
):
    judge = run_room.Run._judge
    monkeypatch.setattr(
        run_room.Run, "_judge", lambda run, loss: judge(run, loss + 9 * (run.trainee.step > 2))
    )
    config = description(eval_steps=1, save_steps=1)
    first = finetune(config)
    assert first.best_step < first.steps, "the case needs a best step that is not the last"
    best = Path(config.output_dir) / "checkpoints" / f"step-{first.best_step:06d}"
    (best / "state.safetensors").write_bytes(b"")
    again = finetune(config)
    assert again.best_step == again.steps
    assert any("cannot be read back" in notice for notice in again.notices)


def test_other_versions_are_said_when_a_run_resumes(description, monkeypatch):
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        finetune(description())
    real = run_room.versions()
    monkeypatch.setattr(run_room, "versions", lambda: real | {"torch": "9.9"})
    notices = finetune(description()).notices
    assert any(n == f"resumed with torch 9.9, so far it was {real['torch']}" for n in notices)


def test_rows_that_change_while_they_are_read_are_refused(description, rows, monkeypatch):
    read = dataset.read

    def read_and_change(located, *options):
        found = read(located, *options)
        rows.write_text(rows.read_text() + "\n")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "read", read_and_change)
        with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read"):
            finetune(description())
    assert finetune(description()).steps == 6


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
