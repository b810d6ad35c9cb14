# ruff: noqa: F811 - fixtures of another file are arguments here
"""Worst first: what could end a run late is tried before step 1, and the run is the same to the bit."""

from __future__ import annotations

import errno
import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pennyweight.data.batch import Batch
from pennyweight.errors import DiskError, MemoryExhausted
from pennyweight.evaluate import losses
from pennyweight.finetune import finetune, rehearsal
from pennyweight.finetune import run as run_room
from pennyweight.finetune.rehearsal import heaviest, undominated
from pennyweight.model import BaseModel
from pennyweight.report import read_events
from pennyweight.train import Trainee, checkpoint
from tests.test_finetune import description, log, rows  # noqa: F401 - fixtures


@pytest.fixture
def ragged(rows: Path) -> Path:
    """Rows of very different lengths; row 20 is the longest."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["messages"][1]["content"] += " cat" * (number % 3)
    lines[19]["messages"][1]["content"] += " dog" * 5
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return rows


def without(config, **data):
    """The same run without packing, and with other settings of its data."""
    return config.model_copy(
        update={"data": config.data.model_copy(update={"packing": False} | data)}
    )


def events(folder: str, kind: str) -> list[dict]:
    return [e for e in read_events(Path(folder) / "events.jsonl") if e["kind"] == kind]


def left_behind(folder: str) -> dict[str, object]:
    """Every checkpoint's tensors as bytes and progress without the clock, the adapter, the log.

    Python's own random state is left out: beartype draws from it at every call under the tests.
    """
    found: dict[str, object] = {"log": log(folder)}
    for place in sorted((Path(folder) / "checkpoints").glob("step-*")):
        tensors = load_file(place / "state.safetensors")
        tensors.pop("random/python")
        found[place.name] = {name: t.numpy().tobytes() for name, t in tensors.items()}
        told = json.loads((place / "progress.json").read_text())
        own = told["progress"]["run"]
        del own["events_offset"]
        for measured in ("seconds", "peak_bytes"):  # of this machine, not of the run
            del own["tally"][measured]
        found[f"{place.name} progress"] = told
    found["adapter"] = (Path(folder) / "adapter" / "adapter_model.safetensors").read_bytes()
    return found


@pytest.mark.parametrize("packing", [True, False])
def test_a_run_with_a_rehearsal_is_the_run_without_one(description, monkeypatch, packing):
    """Dropout on, gradients accumulated: weights, moments, random states, counters, metric log."""
    settings = {"gradient_accumulation_steps": 2, "save_steps": 1, "save_total_limit": 9}
    config = description("with", **settings)
    if not packing:
        config = without(config)
    finetune(config)

    def nothing_tried(run, predicted, **_):
        yield from ()
        return predicted

    monkeypatch.setattr("pennyweight.finetune.rehearse", nothing_tried)
    bare = config.model_copy(update={"output_dir": config.output_dir + "out"})
    finetune(bare)
    with_it, without_it = left_behind(config.output_dir), left_behind(bare.output_dir)
    assert with_it.pop("step-000000")
    with_it.pop("step-000000 progress")
    assert with_it == without_it


class Watch:
    """Batches that pass through a trainee, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Batch] = []
        first = Trainee.forward_backward

        def watched(trainee: Trainee, batch: Batch):
            self.seen.append(batch)
            return first(trainee, batch)

        monkeypatch.setattr(Trainee, "forward_backward", watched)


@pytest.mark.parametrize("packing", [True, False])
def test_the_heaviest_batch_of_all_epochs_comes_first(description, ragged, monkeypatch, packing):
    config = description(max_steps=40)
    if not packing:
        config = without(config)
    watch = Watch(monkeypatch)
    result = finetune(config)
    first, later = watch.seen[0], watch.seen[1:]
    assert len(later) == 40
    assert first.tokens == max(batch.tokens for batch in later)
    sources = {frozenset(batch.sources) for batch in later}
    assert frozenset(first.sources) in sources
    receipt = json.loads((Path(result.output_dir) / "receipt.json").read_text())
    assert receipt["plan"]["micro_batch_tokens"] == first.tokens


def test_batches_that_none_exceeds_in_every_measure():
    sizes = np.random.default_rng(0).integers(0, 6, (200, 3))
    found = {tuple(sizes[i]) for i in undominated(sizes)}
    least = {tuple(a) for a in sizes if not any((b >= a).all() and (b > a).any() for b in sizes)}
    assert found == least
    assert len(undominated(sizes)) == len(found)


def test_too_many_rows_to_look_up_are_stood_for_by_the_longest(description, ragged, monkeypatch):
    monkeypatch.setattr(rehearsal, "ROWS_LOOKED_UP", 1)
    seen = []

    def told(run, predicted):
        seen.append(run.collated(heaviest(run, predicted)))
        return seen[-1] and (0,)

    monkeypatch.setattr(rehearsal, "heaviest", told)
    finetune(without(description(max_steps=40)))
    (batch,) = seen
    assert len(batch.sources) == 4
    assert "rows.jsonl:20" in batch.sources


class Allocator:
    """Room for so many tokens in a training pass, and in an evaluation."""

    def __init__(self, monkeypatch, *, training: int = 10**9, evaluation: int = 10**9) -> None:
        hidden = BaseModel.hidden

        def limited(base, ids, positions):
            room = training if torch.is_grad_enabled() else evaluation
            if len(ids) > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return hidden(base, ids, positions)

        monkeypatch.setattr(BaseModel, "hidden", limited)


def plain(config):
    """Without dropout, whose picks depend on how a batch is cut."""
    return config.model_copy(
        update={"adapter": config.adapter.model_copy(update={"lora_dropout": 0.0})}
    )


def test_out_of_memory_shows_at_once_and_corrects_the_plan(
    description,
    ragged,
    monkeypatch,
    capsys,
):
    expected = finetune(plain(description("roomy")))
    Allocator(monkeypatch, training=100)
    result = finetune(plain(description("tight")))
    assert result.loss_after == pytest.approx(expected.loss_after, rel=1e-5)
    kinds = [e["kind"] for e in read_events(Path(result.output_dir) / "events.jsonl")]
    assert kinds.index("plan_corrected") < kinds.index("rehearsal") < kinds.index("step")
    (corrected,) = events(result.output_dir, "plan_corrected")
    assert corrected["corrected_peak_bytes"] < corrected["planned_peak_bytes"]
    assert result.planned_peak_bytes == corrected["corrected_peak_bytes"]
    (told,) = events(result.output_dir, "rehearsal")
    assert told["limit_tokens"] < 128
    assert not any(e["notices"] for e in events(result.output_dir, "step"))
    said = capsys.readouterr().err
    assert "out of memory with" in said
    assert "plan corrected:" in said


def test_one_row_that_does_not_fit_ends_the_run_before_its_first_step(
    description,
    ragged,
    monkeypatch,
):
    config = description()
    Allocator(monkeypatch, training=62)
    with pytest.raises(MemoryExhausted, match=r"rows\.jsonl:20: one row of \d+ tokens") as caught:
        finetune(config)
    assert caught.value.exit_code == 6
    assert not events(config.output_dir, "step")


def test_a_long_row_in_a_light_batch_is_tried_too(description, ragged, monkeypatch):
    """After halving, what does not fit is a row that the worst batch may not even hold."""
    config = description()
    Allocator(monkeypatch, training=64)
    watch = Watch(monkeypatch)
    finetune(config)
    assert watch.seen[1].sources == ("rows.jsonl:20",)


def test_evaluations_too_go_in_smaller_batches(description, monkeypatch):
    expected = finetune(description("roomy"))
    Allocator(monkeypatch, evaluation=60)
    result = finetune(description("tight"))
    assert result.loss_after == pytest.approx(expected.loss_after, rel=1e-5)
    assert any("out of memory evaluating" in notice for notice in result.notices)
    Allocator(monkeypatch, evaluation=5)
    with pytest.raises(MemoryExhausted, match="one held-out row of"):
        finetune(description("tighter"))


def test_training_and_evaluating_never_stand_on_what_the_other_freed(description, monkeypatch):
    """On a CPU that was a fifth of a run's peak: memory goes back before and after each evaluation."""
    done: list[str] = []
    reading = rehearsal.evaluate_loss, run_room.loss_by_batch
    monkeypatch.setattr(run_room, "release_cached", lambda device: done.append("given back"))

    def read(*given):
        done.append("evaluated")
        return reading[0](*given)

    def read_by_batch(*given):
        done.append("evaluated")
        return reading[1](*given)

    monkeypatch.setattr(rehearsal, "evaluate_loss", read)
    monkeypatch.setattr(run_room, "loss_by_batch", read_by_batch)
    finetune(description("given-back", eval_steps=1, max_steps=2))
    assert done == ["given back", "evaluated", "given back"] * 5  # rehearsal, base, 1, 2, end


def test_too_small_a_disk_is_refused_with_numbers(description, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda _: usage(10**6, 0, 10_000))
    config = description()
    with pytest.raises(DiskError, match=r"will write .* MB \(3 checkpoints of .* 0\.0 MB are free"):
        finetune(config)
    assert not events(config.output_dir, "step")


def test_a_disk_that_refuses_is_met_before_the_first_step(description, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    config = description()
    with pytest.raises(DiskError, match="No space left on device"):
        finetune(config)
    assert not events(config.output_dir, "step")


def test_step_0_is_saved_and_retired_like_any_other(description):
    config = description("first", save_steps=1, save_total_limit=1)
    finetune(config)
    kept = sorted(p.name for p in (Path(config.output_dir) / "checkpoints").iterdir())
    assert "step-000000" not in kept
    held = description("none held out", save_steps=3, eval_steps=None)
    held = held.model_copy(update={"data": held.data.model_copy(update={"eval_fraction": 0.0})})
    finetune(held)
    kept = sorted(p.name for p in (Path(held.output_dir) / "checkpoints").iterdir())
    assert kept == ["step-000003", "step-000006"]


def test_killed_before_step_1_it_begins_anew_even_with_other_settings(
    description,
    monkeypatch,
):
    whole = description("whole")
    finetune(whole)
    config = description("killed")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_room.Run, "introduce", killed)
        with pytest.raises(KeyboardInterrupt):
            finetune(description("killed", learning_rate=0.5))
    assert (Path(config.output_dir) / "checkpoints" / "step-000000").is_dir()
    result = finetune(config)
    assert result.resumed_from is None
    again, expected = left_behind(config.output_dir), left_behind(whole.output_dir)
    assert again == expected


def test_a_resumed_run_rehearses_without_saving(description, monkeypatch):
    config = description()
    save = run_room.Run.save

    def stop_after_three(run):
        written = save(run)
        if run.trainee.step == 3:
            raise KeyboardInterrupt
        return written

    with monkeypatch.context() as patch:
        patch.setattr(run_room.Run, "save", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    result = finetune(config)
    assert result.resumed_from == 3
    told = events(config.output_dir, "rehearsal")
    assert [e["saved"] for e in told] == [True, False]
    assert result.seconds_to_first_step > 0


def test_held_out_rows_are_evaluated_in_the_order_they_were(description, monkeypatch):
    """Without a shortage of memory evaluations are cut as `in_batches` cuts by itself."""
    seen = []
    monkeypatch.setattr(
        run_room, "in_batches", lambda rows, **k: seen.append(k) or losses.in_batches(rows, **k)
    )
    finetune(description())
    assert {k["budget_tokens"] for k in seen} == {4096}
