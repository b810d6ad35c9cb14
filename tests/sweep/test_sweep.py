# ruff: noqa: F811 - fixtures of another file are arguments here
"""Many adapters by one command: each the run it would be alone, stopped, resumed and failed apart."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pennyweight.config import variants
from pennyweight.errors import ConfigError, Interrupted
from pennyweight.finetune import finetune
from pennyweight.report import Report
from pennyweight.sweep import WORTH_SHARING, sizes, sweep
from tests.test_finetune import description, log, rows  # noqa: F401 - fixtures


@pytest.fixture
def many(description, monkeypatch):
    """The tiny run with `adapters`; no picture, which takes longer than the run."""
    monkeypatch.setattr("pennyweight.finetune.run.plot_losses", lambda *_, **__: None)
    monkeypatch.setattr("pennyweight.sweep.outcome.plot_many", lambda *_, **__: None)

    def make(name: str = "many", *, train: dict | None = None, **adapters: object):
        config = description(name, **(train or {}))
        tree = config.model_dump(exclude_unset=True) | {"adapters": adapters}
        return type(config).model_validate(tree)

    return make


GRID = {"adapter.r": [2, 4], "train.learning_rate": [1e-2, 3e-3]}


def weights(folder: Path | str) -> dict[str, bytes]:
    found = load_file(Path(folder) / "adapter" / "adapter_model.safetensors")
    return {name: tensor.numpy().tobytes() for name, tensor in found.items()}


def test_four_at_once_end_as_each_alone_also_after_a_signal(many, description, monkeypatch):
    config = many(grid=GRID)
    told, left = Report.step, [3]

    def tell_and_stop(self, step, **options):
        told(self, step, **options)
        if step.number in left:
            left.remove(step.number)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Report, "step", tell_and_stop)
    with pytest.raises(Interrupted, match="SIGTERM: 4 of 4 adapters are not finished"):
        sweep(config)
    found = sweep(config)
    assert [each.status for each in found.adapters] == ["finished"] * 4
    assert found.exit_code == 0
    for each, (name, alone) in zip(found.adapters, variants(config).items(), strict=True):
        assert each.name == name
        alone = alone.model_copy(update={"output_dir": alone.output_dir + "-alone"})
        assert finetune(alone).loss_after == each.loss_after
        assert weights(each.output_dir) == weights(alone.output_dir)
        assert log(each.output_dir) == log(alone.output_dir)
    columns, lines = found.table()
    assert columns[1:3] == ("adapter.r", "train.learning_rate")
    assert lines[0][0] == min(found.adapters, key=lambda each: each.loss_after).name
    kept = json.loads((Path(config.output_dir) / "adapters.json").read_text())
    assert kept["best"] == lines[0][0]
    logs = [log(each.output_dir) for each in found.adapters]
    again = sweep(config)  # nothing is trained again
    assert [e.loss_after for e in again.adapters] == [e.loss_after for e in found.adapters]
    assert [log(each.output_dir) for each in again.adapters] == logs


def test_fast_is_within_rounding_of_alone(many):
    fast = sweep(many("fast", grid=GRID, mode="fast"))
    exact = sweep(many("exact", grid=GRID))
    assert (fast.shared_passes, exact.shared_passes) == (fast.adapters[0].steps, 0)
    for one, other in zip(fast.adapters, exact.adapters, strict=True):
        assert one.status == "finished"
        assert one.loss_after == pytest.approx(other.loss_after, rel=1e-4)


def test_micro_batches_too_large_to_be_worth_sharing_go_one_by_one(many):
    config = many(grid=GRID, mode="fast", train={"batch_size": WORTH_SHARING["cpu"]})
    said = sizes(variants(config), shared=True)
    assert said.pass_tokens == said.plan.micro_batch_tokens > WORTH_SHARING["cpu"] / 2
    assert said.pass_bytes == 0


def test_losers_are_stopped_saved_and_stay_so(many):
    config = many(
        train={"eval_steps": 1, "save_steps": 1},
        grid={"train.learning_rate": [1e-2, 1e-6, 3e-6, 3e-3]},
        stop="halving",
        stop_after=2,
    )
    found = sweep(config)
    status = {each.name: (each.status, each.steps) for each in found.adapters}
    assert status["learning_rate-1e-6"] == ("stopped", 2)
    assert status["learning_rate-3e-6"] == ("stopped", 2)
    assert sorted(each.status for each in found.adapters)[:1] == ["finished"]
    gone = Path(config.output_dir) / "learning_rate-1e-6"
    assert (gone / "checkpoints" / "step-000002").is_dir()
    again = sweep(config)
    assert {e.name: (e.status, e.steps) for e in again.adapters} == status


def test_what_one_fails_of_is_its_own_affair(many, tmp_path):
    config = many(
        list=[
            {"name": "good"},
            {"name": "bad", "data.train": str(tmp_path / "absent.jsonl")},
        ],
    )
    found = sweep(config)
    good, bad = found.adapters
    assert (good.status, bad.status) == ("finished", "failed")
    assert "absent.jsonl" in bad.why
    assert found.exit_code == bad.exit_code == 65


def test_memory_counts_the_base_once(many):
    config = many(grid={"adapter.r": [2, 4, 8]})
    runs = variants(config)
    all_of_them = sizes(runs)
    assert all_of_them.largest == "r-8"
    alone = sizes({"r-8": runs["r-8"]})
    assert alone.standing_bytes == 0
    others = 16 * sum(sizes({n: runs[n]}).plan.trained_parameters for n in ("r-2", "r-4"))
    assert all_of_them.peak_bytes - alone.peak_bytes == others
    shared = sizes(runs, shared=True)
    assert alone.pass_tokens < shared.pass_tokens <= WORTH_SHARING["cpu"]
    assert shared.peak_bytes == all_of_them.peak_bytes + shared.pass_bytes > all_of_them.peak_bytes
    told = all_of_them.to_dict()
    assert [each["name"] for each in told["adapters"]] == ["r-2", "r-4", "r-8"]
    assert told["steps"] == sum(each["steps"] for each in told["adapters"]) == 3 * alone.steps
    rows = {what: size for what, size, _ in shared.table_rows()}
    assert {"adapter r-2", "shared passes", "other adapters", "peak of all"} <= rows.keys()
    assert rows["steps of all"] == f"{told['steps']:,}"
    assert "steps" not in rows  # those of the largest alone say nothing of all
    tight = sizes(runs, budget_bytes=alone.peak_bytes)
    assert not tight.fits
    assert "describe fewer adapters" in tight.sentence()


def test_one_run_does_not_pass_over_the_others(many):
    with pytest.raises(ConfigError, match="describes several runs"):
        finetune(many(grid=GRID))
